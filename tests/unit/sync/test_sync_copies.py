"""What buckets have cut is copied as one again where it lies side by side on both sides."""

import pytest
import torch
from plan_cases import endpoint

from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.copies import merge_pulls, run_copies
from chatlearn.sync.plan import plan_sync
from chatlearn.sync.programs import Part, Pull, build_programs
from chatlearn.sync.state import Programs, SyncCall

BUCKET_BYTES = 64


def held(shape, *, local=None, box=None, name="w", key="w", dtype="float32"):
    """A shard: by default all of a tensor, as it lies in a local one of the same shape."""
    place = box or Box((0,) * len(shape), shape)
    return TensorShard(key, shape, place, dtype, name, local or (0,) * len(shape))


def copies_of(sources, taker):
    """The copies of the one taker, by source."""
    ranks = [endpoint("a", rank, shards) for rank, shards in enumerate(sources)]
    plan = plan_sync(ranks, [endpoint("b", 0, taker)], BUCKET_BYTES)
    program = build_programs(plan, lambda _: False)[-1]
    assert len(program.pulls) > len(sources)
    return merge_pulls(program.pulls)


def spans(region):
    return [(each.start, each.stop) for each in region.slices]


@pytest.mark.parametrize("shape", [(100,), (40, 5), (3, 40), (5, 3, 7), (2, 3, 50), (1, 90)])
def test_a_tensor_that_buckets_cut_along_any_axes_is_copied_as_a_whole(shape):
    (copy,) = copies_of([[held(shape)]], [held(shape)])[0]
    assert copy.given == copy.taken
    assert spans(copy.given) == [(0, length) for length in shape]
    tensor = torch.zeros(shape)
    assert copy.taken.find({"w": tensor}) is tensor
    longer = torch.zeros((shape[0] + 1, *shape[1:]))
    assert copy.taken.find({"w": longer}).shape == shape


def test_the_halves_of_one_tensor_are_copied_as_one():
    halves = [
        held((2, 12, 4), local=(12 * at, 0), box=Box((at, 0, 0), (1, 12, 4))) for at in (0, 1)
    ]
    (copy,) = copies_of([halves], halves)[0]
    assert spans(copy.given) == spans(copy.taken) == [(0, 24), (0, 4)]


def test_parts_that_lie_side_by_side_on_one_side_alone_stay_apart():
    given = [held((2, 12, 4))]
    taken = [held((2, 12, 4), local=(20 * at, 0), box=Box((at, 0, 0), (1, 12, 4))) for at in (0, 1)]
    found = copies_of([given], taken)[0]
    assert [spans(copy.given) for copy in found] == [
        [(0, 1), (0, 12), (0, 4)],
        [(1, 2), (0, 12), (0, 4)],
    ]
    assert [spans(copy.taken) for copy in found] == [[(0, 12), (0, 4)], [(20, 32), (0, 4)]]
    source, target = {"w": torch.randn(2, 12, 4)}, {"w": torch.zeros(32, 4)}
    run_copies(found, source, target)
    assert torch.equal(target["w"][:12], source["w"][0])
    assert torch.equal(target["w"][20:], source["w"][1])
    assert not target["w"][12:20].any()


def test_parts_that_continue_along_different_axes_stay_apart():
    parts = (
        [(Part("w", "w", (slice(2 * at, 2 * at + 2), slice(0, 2))),) for at in range(2)],
        [(Part("w", "w", (slice(0, 2), slice(2 * at, 2 * at + 2))),) for at in range(2)],
    )
    pulls = [Pull(0, given, taken) for given, taken in zip(*parts, strict=True)]
    assert len(merge_pulls(pulls)[0]) == 2


def test_shards_of_two_sources_are_a_copy_each():
    rows = [held((40, 4), box=Box((20 * at, 0), (20, 4))) for at in (0, 1)]
    found = copies_of([rows[:1], rows[1:]], [held((40, 4))])
    assert {source: [spans(copy.taken) for copy in copies] for source, copies in found.items()} == {
        0: [[(0, 20), (0, 4)]],
        1: [[(20, 40), (0, 4)]],
    }


def test_what_is_kept_is_that_of_the_sync():
    """Of the changed tensors alone, or of all."""
    shards = [held((9, 4), name=name, key=name) for name in ("w", "fixed")]
    ranks = [[endpoint(name, 0, shards, frozen=("fixed",))] for name in "ab"]
    full, trained = (
        build_programs(plan_sync(*ranks, BUCKET_BYTES, skip_frozen=skip), lambda _: False)[-1]
        for skip in (False, True)
    )
    names = {}
    for others in (trained, None):
        kept = Programs(full, others, 0, {})
        for is_full in (True, False):
            copies = kept.copies_of(SyncCall("key", 1, is_full))[0]
            names[others is None, is_full] = {copy.taken.local_name for copy in copies}
    both = {"w", "fixed"}
    assert names == {
        (False, True): both,
        (False, False): {"w"},
        (True, True): both,
        (True, False): both,
    }
