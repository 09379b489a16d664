"""Attention as batched products is that of torch's own kernel, with its gradient."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from megatron_adapters import short_attention
from megatron_adapters.short_attention import attend_short, is_short

BATCH, HEADS, GROUPS, SIZE, VALUE_SIZE = 3, 4, 2, 8, 6


def draw(dtype, num_queries, num_keys):
    source = torch.Generator().manual_seed(0)
    shapes = [
        (num_queries, HEADS, SIZE),
        (num_keys, GROUPS, SIZE),
        (num_keys, GROUPS, VALUE_SIZE),
    ]
    return [
        # As in a model: heads lie behind the tokens.
        torch.randn((BATCH, *shape), generator=source, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for shape in shapes
    ]


def mask_of(num_queries, num_keys, dtype):
    """Each sequence has a prefix of its own that all its queries see."""
    at = torch.arange(num_keys)
    distance = torch.arange(num_queries)[:, None] + num_keys - num_queries - at
    sees = (distance >= 0) & (torch.arange(1, BATCH + 1)[:, None, None] >= distance - 60)
    sees[..., 0] = True
    return torch.zeros(sees.shape).masked_fill(~sees, float("-inf"))[:, None].to(dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_values_and_gradients_are_those_of_the_fused_kernel(dtype, most, is_masked, scale):
    num_queries, num_keys = (150, 190) if is_masked else (200, 200)
    inputs = draw(dtype, num_queries, num_keys)
    mask = mask_of(num_queries, num_keys, dtype) if is_masked else None
    exact = [value.detach().double().requires_grad_() for value in inputs]
    expected = scaled_dot_product_attention(
        *exact,
        attn_mask=None if mask is None else mask.double(),
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    found = attend_short(*inputs, mask, offset=num_keys - num_queries, scale=scale)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).double()
    gradients = torch.autograd.grad((expected * weight).sum(), exact)
    own = torch.autograd.grad((found * weight.to(dtype)).sum(), inputs)
    assert found.dtype == dtype
    for one, other in zip([found, *own], [expected, *gradients], strict=True):
        assert (one - other).norm() < most * other.norm()


def test_long_sequences_and_other_dtypes_go_to_the_fused_kernel():
    queries, keys, _ = draw(torch.float32, 4, 513)
    assert not is_short(queries, keys)
    assert is_short(queries, keys[:, :, :512])
    assert is_short(queries.bfloat16(), keys.bfloat16())
    assert not is_short(queries.half(), keys.half())


def test_small_and_large_products_of_bfloat16_agree(monkeypatch):
    """Which dtype they are in depends on the batch; the weights are rounded in both."""
    found = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(short_attention, "_LEAST_COMPILED", least)
        inputs = draw(torch.bfloat16, 200, 200)
        context = attend_short(*inputs, None)
        found.append([context, *torch.autograd.grad(context.float().square().sum(), inputs)])
    for one, other in zip(*found, strict=True):
        assert (one.double() - other.double()).norm() < 4e-3 * other.double().norm()
