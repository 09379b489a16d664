"""Grouped attention with a mask: with the heads of a group one after another, and without."""

import pytest
import torch

from megatron_adapters.masked_attention import attend_fused

BATCH, HEADS, GROUPS, QUERIES, KEYS, SIZE = 2, 6, 2, 5, 9, 8


def tensors(value_size=SIZE):
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (BATCH, HEADS, QUERIES, SIZE),
        (BATCH, GROUPS, KEYS, SIZE),
        (BATCH, GROUPS, KEYS, value_size),
    ]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def by_hand(queries, keys, values, mask, scale):
    keys, values = (t.repeat_interleave(HEADS // GROUPS, 1) for t in (keys, values))
    return (queries @ keys.mT * scale + mask).softmax(-1) @ values


def additive(kind):
    seen = torch.ones(QUERIES, KEYS, dtype=torch.bool).tril(KEYS - QUERIES)
    if kind == "boolean":
        return seen
    scores = torch.zeros(QUERIES, KEYS).masked_fill(~seen, float("-inf"))
    if kind == "for all":
        return scores
    # Each sequence of the batch has a mask of its own.
    shifted = torch.zeros(BATCH, 1, QUERIES, KEYS)
    shifted[0] = scores
    shifted[1, ..., -2:] = float("-inf")
    return shifted


@pytest.mark.parametrize("kind", ["boolean", "for all", "for each"])
@pytest.mark.parametrize("value_size", [SIZE, 4])
@pytest.mark.parametrize("folds", [False, True])
def test_output_and_gradients_are_those_of_repeated_heads(kind, value_size, folds):
    mask = additive(kind)
    added = mask
    if kind == "boolean":
        added = torch.zeros(QUERIES, KEYS).masked_fill(~mask, float("-inf"))
    given = tensors(value_size)
    expected = by_hand(*given, added, 0.3)
    found = attend_fused(*given, mask, scale=0.3, folds=folds)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.arange(found.numel(), dtype=torch.float32).reshape(found.shape).cos()
    pairs = zip(
        torch.autograd.grad((found * weights).sum(), given),
        torch.autograd.grad((expected * weights).sum(), given),
        strict=True,
    )
    for own, other in pairs:
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
