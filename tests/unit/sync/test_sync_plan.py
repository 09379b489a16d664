"""The plan of a weight sync: every destination element once, from a rank that holds it."""

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.plan import Endpoint, plan_sync, summarize_plan


def shard(key, shape, offset, size, *, dtype="float32"):
    box = Box(tuple(offset), tuple(size))
    return TensorShard(key, tuple(shape), box, dtype, f"local.{key}", (0,) * len(size))


def endpoint(name, rank, shards, *, replica=0, node="n0", process=None):
    process_id = process if process is not None else hash((name, replica, rank))
    return Endpoint(name, replica, rank, node, process_id, tuple(shards))


def grid(shape, cuts):
    """Boxes of a tensor that is cut at the given places of each axis."""
    axes = []
    for length, places in zip(shape, cuts, strict=True):
        edges = sorted({0, length, *(place % length for place in places)})
        axes.append([(a, b - a) for a, b in pairwise(edges)])
    for combination in product(*axes):
        yield tuple(a for a, _ in combination), tuple(n for _, n in combination)


def elements(box):
    starts = zip(box.offset, box.shape, strict=True)
    return set(product(*(range(at, at + length) for at, length in starts)))


@st.composite
def models(draw):
    """Source and destination ranks that cut the same tensors at random places."""
    shapes = draw(st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=1, max_size=3))
    sides = []
    for name, copies in (("trainer", draw(st.integers(1, 2))), ("policy", draw(st.integers(1, 3)))):
        num_ranks = draw(st.integers(1, 4))
        held = [[] for _ in range(num_ranks)]
        for number, shape in enumerate(shapes):
            cuts = [draw(st.lists(st.integers(0, 5), max_size=2)) for _ in shape]
            for offset, size in grid(shape, cuts):
                piece = shard(f"w{number}", shape, offset, size)
                held[draw(st.integers(0, num_ranks - 1))].append(piece)
        sides.append(
            [
                endpoint(name, rank, own, replica=copy, node=f"n{draw(st.integers(0, 1))}")
                for copy in range(copies)
                for rank, own in enumerate(held)
            ]
        )
    return sides


@given(models(), st.sampled_from([4, 12, 1 << 20]))
def test_every_destination_element_is_written_once_from_a_holder(sides, bucket_bytes):
    sources, destinations = sides
    plan = plan_sync(sources, destinations, bucket_bytes)
    written = {}
    for message in plan.messages:
        source, destination = (plan.endpoints[i] for i in (message.source, message.destination))
        for transfer in message.transfers:
            assert transfer.source in source.shards
            assert transfer.destination in destination.shards
            assert elements(transfer.box) <= elements(transfer.source.box)
            assert elements(transfer.box) <= elements(transfer.destination.box)
            for at in elements(transfer.box):
                place = (message.destination, transfer.destination.key, at)
                written[place] = written.get(place, 0) + 1
    expected = {
        (len(sources) + number, each.key, at)
        for number, destination in enumerate(destinations)
        for each in destination.shards
        for at in elements(each.box)
    }
    assert written == dict.fromkeys(expected, 1)
    assert plan.num_bytes == 4 * len(expected)


@given(models(), st.sampled_from([4, 12, 64]))
def test_messages_stay_within_a_bucket_where_a_box_can_be_cut(sides, bucket_bytes):
    sources, destinations = sides
    for message in plan_sync(sources, destinations, bucket_bytes).messages:
        size = sum(transfer.num_bytes for transfer in message.transfers)
        assert size <= bucket_bytes or len(message.transfers) == 1


@given(models())
def test_the_plan_is_a_function_of_its_arguments(sides):
    sources, destinations = sides
    assert plan_sync(sources, destinations) == plan_sync(sources, destinations)


def halves(name, **options):
    return [
        endpoint(name, rank, [shard("w", (4, 2), (2 * rank, 0), (2, 2))], **options)
        for rank in (0, 1)
    ]


def whole(name, rank=0, **options):
    return endpoint(name, rank, [shard("w", (4, 2), (0, 0), (4, 2))], **options)


def test_tensor_halves_are_gathered_into_a_whole():
    plan = plan_sync(halves("trainer"), [whole("policy")])
    moved = [(m.source, m.destination, [t.box for t in m.transfers]) for m in plan.messages]
    assert moved == [(0, 2, [Box((0, 0), (2, 2))]), (1, 2, [Box((2, 0), (2, 2))])]
    assert plan.bytes_by_link == {"process": 0, "node": 32, "network": 0}


def test_the_shortest_link_sends():
    sources = [whole("trainer", 0, node="far"), whole("trainer", 1, node="near", process=7)]
    near = whole("policy", node="near", process=8)
    same = whole("policy", replica=1, node="near", process=7)
    far = whole("policy", replica=2, node="other")
    plan = plan_sync(sources, [near, same])
    assert {m.source for m in plan.messages} == {1}
    assert plan.bytes_by_link == {"process": 32, "node": 32, "network": 0}
    assert plan_sync(sources, [far]).bytes_by_link["network"] == 32


def test_equal_holders_share_the_load():
    sources = [whole("trainer", rank) for rank in range(3)]
    destinations = [whole("policy", replica=replica) for replica in range(6)]
    plan = plan_sync(sources, destinations)
    assert sorted(m.source for m in plan.messages) == [0, 0, 1, 1, 2, 2]


def test_messages_of_all_pairs_take_turns():
    plan = plan_sync(halves("trainer"), [whole("policy")], bucket_bytes=8)
    assert [m.source for m in plan.messages] == [0, 1, 0, 1]


def test_a_message_holds_one_dtype():
    shards = [
        shard("a", (2,), (0,), (2,)),
        shard("b", (2,), (0,), (2,), dtype="bfloat16"),
        shard("c", (2,), (0,), (2,)),
    ]
    plan = plan_sync([endpoint("trainer", 0, shards)], [endpoint("policy", 0, shards)])
    keys = [[t.source.key for t in m.transfers] for m in plan.messages]
    assert keys == [["b"], ["a", "c"]]
    assert plan.num_bytes == 4 + 16


def test_the_source_dtype_counts_where_the_destination_rounds():
    source = endpoint("trainer", 0, [shard("w", (4,), (0,), (4,))])
    rounded = endpoint("policy", 0, [shard("w", (4,), (0,), (4,), dtype="bfloat16")])
    assert plan_sync([source], [rounded]).num_bytes == 16


def test_tensors_that_the_destination_lacks_are_left_out_and_named():
    extra = shard("head", (2,), (0,), (2,))
    source = endpoint("trainer", 0, [*whole("trainer").shards, extra])
    plan = plan_sync([source], [whole("policy")])
    assert plan.unused_keys == ("head",)
    assert dict(summarize_plan(plan)) == {
        "messages": "1",
        "bytes moved": "32",
        "  over process": "0",
        "  over node": "32",
        "  over network": "0",
        "tensors left out": "head",
    }


def test_a_hole_names_tensor_and_ranks():
    sources = [endpoint("trainer", 0, [shard("w", (4,), (0,), (2,))])]
    with pytest.raises(SyncError, match=r"w: the shards of trainer.r0.0 leave a hole: 2 of 4"):
        plan_sync(sources, [])


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


def test_copies_of_a_box_are_no_overlap():
    sources = [whole("trainer", rank) for rank in range(3)]
    assert plan_sync(sources, [whole("policy")]).num_bytes == 32


def test_ranks_that_disagree_on_a_shape_are_named():
    sources = [*halves("trainer"), endpoint("trainer", 2, [shard("w", (5, 2), (4, 0), (1, 2))])]
    with pytest.raises(SyncError, match=r"w: its ranks \(trainer.r0.0, .*\) disagree on shape"):
        plan_sync(sources, [])


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
