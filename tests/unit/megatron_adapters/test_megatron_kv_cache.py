"""Rows that only fill up a batch change nothing that is held, and nothing that is found."""

import mmap

import pytest
import torch

from chatlearn.generation.contract import DecodeRows
from megatron_adapters.huge_pages import ask_for_huge_pages
from megatron_adapters.kv_cache import CacheView, KVCache, cache_dtype, fill_up

LAYER_INDEX = {1: 0}
COUNT, NUM_SLOTS, LENGTH, GROUPS, HEADS, SIZE = 5, 7, 12, 2, 3, 8
CPU = torch.device("cpu")


def make_cache():
    cache = KVCache(1, NUM_SLOTS, LENGTH, GROUPS, SIZE, SIZE, dtype=torch.float32, device=CPU)
    source = torch.Generator().manual_seed(0)
    for held in (cache.keys[0], cache.values[0]):
        held.copy_(torch.randn(held.shape, generator=source))
    return cache


def attend(cache, rows, *, fills_up, dtype):
    view = CacheView.build(cache, LAYER_INDEX, [], rows, CPU, fills_up=fills_up)
    source = torch.Generator().manual_seed(1)
    drawn = torch.randn((NUM_SLOTS, GROUPS, HEADS + 2, SIZE), generator=source).to(dtype)
    drawn = drawn[: len(view.token_ids)]
    context = view.attend(1, drawn[:, :, :HEADS], drawn[:, :, HEADS], drawn[:, :, -1], None)
    return view, context


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [[4, 4, 4, 4, 4], [4, 9, 2, 0, 6]])
def test_rows_that_fill_up_do_not_show(positions, dtype):
    at = torch.tensor(positions)
    rows = DecodeRows(torch.arange(COUNT), at, int(at.max()) + 1, len(set(positions)) == 1)
    plain, filled = make_cache(), make_cache()
    _, expected = attend(plain, rows, fills_up=False, dtype=dtype)
    view, found = attend(filled, rows, fills_up=True, dtype=dtype)
    assert view.num_fill == NUM_SLOTS - COUNT == 2
    assert found.dtype == dtype
    assert torch.equal(found[:COUNT], expected)
    assert found.isfinite().all()
    for one, other in ((filled.keys, plain.keys), (filled.values, plain.values)):
        # The last slot is there for what fills up.
        assert torch.equal(one[0][:-1], other[0][:-1])


def test_batches_have_few_sizes():
    assert [fill_up(n) for n in (1, 2, 3, 5, 9, 16, 17, 200)] == [1, 2, 4, 8, 16, 16, 32, 208]


def test_on_a_processor_a_bfloat16_model_has_a_float32_cache():
    assert cache_dtype(torch.bfloat16, CPU) == torch.float32
    assert cache_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert cache_dtype(torch.float16, CPU) == torch.float16


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the kernel's headers lack it")
def test_large_tensors_are_offered_huge_pages_and_small_ones_are_not():
    assert not ask_for_huge_pages(torch.empty(1000))
    large = torch.empty(1 << 21)
    ask_for_huge_pages(large)
    assert large.zero_().sum() == 0
