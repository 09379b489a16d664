"""Descriptions that cannot be right are refused, with the tensor and the ranks."""

import os
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import endpoint, halves, models, shard, whole, whole_vector

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.plan import plan_sync

# `make test-long` tries many more.
EXAMPLES = int(os.environ.get("CHATLEARN_TEST_EXAMPLES", "200"))


def test_a_hole_names_tensor_and_ranks():
    sources = [endpoint("trainer", 0, [shard("w", (4,), (0,), (2,))])]
    with pytest.raises(SyncError, match=r"w: the shards of trainer.r0.0 leave a hole: 2 of 4"):
        plan_sync(sources, [])


def test_a_hole_in_one_replica_names_its_ranks():
    half = endpoint("policy", 0, [shard("w", (4, 2), (0, 0), (2, 2))], replica=1)
    with pytest.raises(SyncError, match=r"w: the shards of policy.r1.0 leave a hole: 4 of 8"):
        plan_sync([whole("trainer")], [whole("policy"), half])


def test_an_overlap_names_tensor_and_ranks():
    sources = [endpoint("trainer", rank, [shard("w", (4,), (rank,), (3,))]) for rank in (0, 1)]
    message = r"w: the shards of trainer.r0.0, trainer.r0.1 leave an overlap: 6 of 4"
    with pytest.raises(SyncError, match=message):
        plan_sync(sources, [])


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ((4, 2), [(0, 0), (1, 0)]),
        ((2, 4), [(0, 0), (0, 1)]),
        ((2, 4), [(0, 2), (0, 1)]),
    ],
)
def test_an_overlap_that_hides_a_hole_of_its_size_is_found(shape, offsets):
    sources = [
        endpoint("trainer", rank, [shard("w", shape, offset, (2, 2))])
        for rank, offset in enumerate(offsets)
    ]
    with pytest.raises(SyncError, match=r"w: the shards of trainer.r0.\d, .* overlap, .* a hole"):
        plan_sync(sources, [])


def test_an_overlap_in_local_memory_is_found():
    pieces = [
        TensorShard(key, (4,), Box((0,), (4,)), "float32", "buffer", (start,))
        for key, start in (("a", 0), ("b", 3))
    ]
    with pytest.raises(SyncError, match=r"a, b: trainer.r0.0 .* tensor buffer twice"):
        plan_sync([endpoint("trainer", 0, pieces)], [])


def test_a_box_that_one_rank_describes_twice_is_found():
    pieces = [
        TensorShard("a", (4,), Box((0,), (4,)), "float32", name, (0,)) for name in ("one", "two")
    ]
    with pytest.raises(
        SyncError, match=r"a: trainer.r0.0 holds one box of it twice, in one and two"
    ):
        plan_sync([endpoint("trainer", 0, pieces)], [])


def test_copies_of_a_box_are_no_overlap():
    sources = [whole("trainer", rank) for rank in range(3)]
    assert plan_sync(sources, [whole("policy")]).num_bytes == 32


def test_ranks_that_disagree_on_a_shape_are_named():
    sources = [*halves("trainer"), endpoint("trainer", 2, [shard("w", (5, 2), (4, 0), (1, 2))])]
    with pytest.raises(SyncError, match=r"w: its ranks \(trainer.r0.0, .*\) disagree on shape"):
        plan_sync(sources, [])


def test_replicas_that_disagree_on_a_dtype_are_named():
    takers = [
        whole_vector("policy", 4),
        endpoint("policy", 0, [shard("w", (4,), (0,), (4,), dtype="bfloat16")], replica=1),
    ]
    with pytest.raises(SyncError, match=r"w: its ranks \(policy.r0.0, policy.r1.0\) disagree"):
        plan_sync([whole_vector("trainer", 4)], takers)


def test_a_dtype_that_cannot_be_moved_is_named():
    odd = endpoint("trainer", 0, [shard("w", (4,), (0,), (4,), dtype="complex64")])
    with pytest.raises(SyncError, match="w of trainer.r0.0 has the dtype complex64"):
        plan_sync([odd], [])


def test_a_shape_that_differs_names_both_models():
    other = endpoint("policy", 3, [shard("w", (4, 3), (0, 0), (4, 3))])
    message = r"w: trainer has the shape \(4, 2\), policy.r0.3 \(4, 3\): .* same architecture"
    with pytest.raises(SyncError, match=message):
        plan_sync(halves("trainer"), [other])


def test_a_tensor_that_the_source_lacks_is_named():
    other = endpoint("policy", 0, [shard("v", (4,), (0,), (4,))], replica=2)
    message = "policy.r2.0 has the tensor v, which trainer lacks: both models need the same"
    with pytest.raises(SyncError, match=message):
        plan_sync(halves("trainer"), [other])


@pytest.mark.parametrize(
    ("starts", "lengths"), [((0, 6), (2, 2)), ((-2, 0, 4), (2, 4, 2)), ((0, 5), (5, -1))]
)
def test_boxes_outside_of_the_tensor_are_found_though_their_elements_add_up(starts, lengths):
    pieces = [shard("w", (4,), (at,), (n,)) for at, n in zip(starts, lengths, strict=True)]
    with pytest.raises(SyncError, match=r"w: trainer.r0.0 told a box at .* lie within its tensor"):
        plan_sync([endpoint("trainer", 0, pieces)], [whole_vector("policy", 4)])
    with pytest.raises(SyncError, match=r"w: policy.r0.0 told a box at .* lie within its tensor"):
        plan_sync([whole_vector("trainer", 4)], [endpoint("policy", 0, pieces)])


@pytest.mark.parametrize(
    ("shape", "box", "local", "told"),
    [
        ((4,), Box((0, 0), (4, 1)), (0,), "the same number of axes"),
        ((4, 1), Box((0,), (4,)), (0,), "the same number of axes"),
        ((4,), Box((0,), (4, 1)), (0,), "the same number of axes"),
        ((4,), Box((0,), (4,)), (-1,), "nothing below 0"),
        ((4,), Box((0,), (4,)), (0, 0), "no more axes than the tensor"),
        ((4, 2), Box((0, 0), (4, 2)), (0,), "must have length 1"),
    ],
)
def test_a_box_without_a_place_names_tensor_and_ranks(shape, box, local, told):
    odd = TensorShard("w", shape, box, "float32", "buffer", local)
    ranks = [endpoint("trainer", rank, [odd]) for rank in (0, 1)]
    with pytest.raises(SyncError, match=rf"w: trainer.r0.0, trainer.r0.1 told .* buffer: .*{told}"):
        plan_sync(ranks, [whole_vector("policy", 4)])


def test_a_local_tensor_has_one_number_of_axes():
    pieces = [
        TensorShard("a", (4, 1), Box((0, 0), (4, 1)), "float32", "buffer", (0, 0)),
        TensorShard("b", (4,), Box((0,), (4,)), "float32", "buffer", (4,)),
    ]
    with pytest.raises(SyncError, match=r"a, b: trainer.r0.0 .* buffer with different numbers"):
        plan_sync([endpoint("trainer", 0, pieces)], [whole_vector("policy", 4)])


def test_a_side_without_ranks_is_refused():
    with pytest.raises(SyncError, match="the source of a sync has no ranks"):
        plan_sync([], [whole("policy")])
    with pytest.raises(SyncError, match="the destination of a sync has no ranks"):
        plan_sync([whole("trainer")], [])


def moved_along(values, axis, by):
    return (*values[:axis], values[axis] + by, *values[axis + 1 :])


@st.composite
def wrong_sides(draw):
    """A sync of which one shard is described wrongly, and the name of that shard's tensor."""
    sides = draw(models(max_copies=1))
    side = draw(st.sampled_from(sides))
    rank = draw(st.sampled_from([at for at, each in enumerate(side) if each.shards]))
    right = draw(st.sampled_from(side[rank].shards))
    box, local = right.box, right.local_offset
    wrong = [
        [],
        [right, replace(right, local_name="another")],
        [replace(right, dtype="complex64")],
        [replace(right, global_shape=(*right.global_shape, 1))],
        [replace(right, box=Box((*box.offset, 0), box.shape))],
        [replace(right, box=Box(box.offset, (*box.shape, 1)))],
        [replace(right, local_offset=(*local, 0))],
    ]
    if box.shape:
        axis = draw(st.integers(0, len(box.shape) - 1))
        by = draw(st.integers(-8, 8).filter(bool))
        wrong += [
            [replace(right, box=Box(moved_along(box.offset, axis, by), box.shape))],
            [replace(right, box=Box(box.offset, moved_along(box.shape, axis, by)))],
            [replace(right, global_shape=moved_along(right.global_shape, axis, by))],
            [replace(right, local_offset=moved_along(local, axis, -abs(by)))],
        ]
    told = draw(st.sampled_from(wrong))
    kept = [each for each in side[rank].shards if each is not right]
    side[rank] = replace(side[rank], shards=(*kept, *told))
    return sides, right.key


@settings(max_examples=EXAMPLES, deadline=None)
@given(wrong_sides())
def test_one_wrong_shard_is_refused_by_the_name_of_its_tensor(case):
    (sources, destinations), key = case
    with pytest.raises(SyncError, match=r"(trainer|policy)\.r0\.\d") as caught:
        plan_sync(sources, destinations)
    assert key in str(caught.value)
