"""Rows that only fill up a batch change nothing that is held, and nothing that is found."""

from pathlib import Path

import pytest
import torch

from chatlearn.generation.contract import DecodeRows
from megatron_adapters.huge_pages import ask_for_huge_pages
from megatron_adapters.kv_cache import CacheView, KVCache, cache_dtype, fill_up

LAYER_INDEX = {1: 0}
COUNT, NUM_SLOTS, LENGTH, GROUPS, HEADS, SIZE = 5, 7, 12, 2, 3, 8
CPU = torch.device("cpu")


def make_cache(num_slots=NUM_SLOTS):
    cache = KVCache(1, num_slots, LENGTH, GROUPS, SIZE, SIZE, dtype=torch.float32, device=CPU)
    source = torch.Generator().manual_seed(0)
    for held in (cache.keys[0], cache.values[0]):
        held.copy_(torch.randn(held.shape, generator=source))
    return cache


def attend(cache, rows, *, most_rows, dtype):
    view = CacheView.build(cache, LAYER_INDEX, [], rows, CPU, most_rows=most_rows)
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
    _, expected = attend(plain, rows, most_rows=None, dtype=dtype)
    view, found = attend(filled, rows, most_rows=NUM_SLOTS, dtype=dtype)
    assert view.num_fill == NUM_SLOTS - COUNT == 2
    assert found.dtype == dtype
    assert torch.equal(found[:COUNT], expected)
    assert found.isfinite().all()
    for one, other in ((filled.keys, plain.keys), (filled.values, plain.values)):
        # The last slot is there for what fills up.
        assert torch.equal(one[0][:-1], other[0][:-1])


def test_how_far_a_batch_is_filled_up_does_not_depend_on_the_calls_before():
    """They may have left a larger cache; products of more rows may round otherwise."""
    rows = DecodeRows(torch.arange(COUNT), torch.full((COUNT,), 4), 5, is_even=True)
    for num_slots in (6, 40):
        view = CacheView.build(make_cache(num_slots), LAYER_INDEX, [], rows, CPU, most_rows=6)
        assert len(view.token_ids) == 6
        assert view.slots.tolist() == [0, 1, 2, 3, 4, num_slots + 1]


def test_batches_have_few_sizes():
    assert [fill_up(n) for n in (1, 2, 3, 5, 9, 16, 17, 200)] == [1, 2, 4, 8, 16, 16, 32, 208]


def test_on_a_processor_a_bfloat16_model_has_a_float32_cache():
    assert cache_dtype(torch.bfloat16, CPU) == torch.float32
    assert cache_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
    assert cache_dtype(torch.float16, CPU) == torch.float16


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")


def read_mappings():
    """Addresses and kernel's flags of this process's mappings."""
    start = stop = 0
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        head, *rest = line.split()
        if head == "VmFlags:":
            yield start, stop, rest
        elif "-" in head and not head.endswith(":"):
            start, stop = (int(number, 16) for number in head.split("-"))


@pytest.mark.skipif(not HUGE_PAGES.is_dir(), reason="the kernel has no huge pages for processes")
def test_large_tensors_are_offered_huge_pages_and_small_ones_are_not():
    assert not ask_for_huge_pages(torch.empty(1000))
    large = torch.empty(1 << 23)
    assert ask_for_huge_pages(large)
    first = large.data_ptr()
    asked = [
        flags
        for start, stop, flags in read_mappings()
        if start < first + large.nbytes and first < stop
    ]
    assert any("hg" in flags for flags in asked)
