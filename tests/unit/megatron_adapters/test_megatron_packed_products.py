"""Products with weights that were laid out beforehand."""

import pytest
import torch
from torch.nn import functional

from megatron_adapters.packed_products import PackedProducts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 64])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_the_weight_at_the_last_prepare(dtype, num_rows, has_bias):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator).to(dtype)
    bias = torch.randn(96, generator=generator).to(dtype) if has_bias else None
    rows = torch.randn(num_rows, 64, generator=generator).to(dtype)
    products = PackedProducts()
    for _ in range(2):
        products.prepare([weight], num_rows)
        expected = functional.linear(rows, weight, bias)
        torch.testing.assert_close(products.linear(rows, weight, bias), expected)
        weight.mul_(-2.0)


def test_a_weight_that_was_not_prepared_is_read_as_it_is():
    weight, rows = torch.ones(3, 4), torch.ones(2, 4)
    products = PackedProducts()
    products.prepare([torch.zeros(3, 4)], 2)
    assert products.linear(rows, weight).tolist() == [[4.0] * 3] * 2
