"""The digest sees every bit of a tensor and where it stands."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.sync.digest import compute_digest, has_equal_bits

DTYPES = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64]


def values(count, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, (count,), generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 2049, 40_000])
def test_equal_values_have_equal_digests_however_they_lie(dtype, count):
    given_values = values(count, dtype)
    spread = torch.stack([given_values, given_values], 1)[:, 1]
    shifted = torch.cat([values(1, dtype), given_values])[1:]
    assert compute_digest(spread) == compute_digest(given_values) == compute_digest(shifted)


@given(st.integers(1, 50_000), st.data())
def test_one_changed_bit_changes_the_digest(count, data):
    first = values(count, torch.int16)
    second = first.clone()
    second[data.draw(st.integers(0, count - 1))] ^= 1 << data.draw(st.integers(0, 14))
    assert compute_digest(first) != compute_digest(second)


@given(st.integers(2, 50_000), st.data())
def test_two_values_that_swap_places_change_the_digest(count, data):
    first = torch.arange(count, dtype=torch.int32)
    one, other = (data.draw(st.integers(0, count - 1)) for _ in range(2))
    second = first.clone()
    second[one], second[other] = first[other], first[one]
    assert (compute_digest(first) == compute_digest(second)) == (one == other)


def test_zeros_of_another_length_differ():
    assert compute_digest(torch.zeros(8)) != compute_digest(torch.zeros(16))


def test_bits_are_compared_not_values():
    nan = torch.tensor([float("nan"), 1.0])
    assert has_equal_bits(nan, nan.clone())
    assert not has_equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
