"""Lanes and who may use them."""

from flow_fakes import FakeBackend, FakeGroup, Tagger

from chatlearn.flow.lanes import LanePool, build_lanes
from chatlearn.parallel.layout import ParallelLayout


def groups(name, replicas, **sizes):
    layout = ParallelLayout(**sizes)
    return [FakeGroup(FakeBackend(), Tagger(name), at, layout) for at in range(replicas)]


def test_there_is_a_lane_for_each_data_parallel_copy_of_each_replica():
    lanes = build_lanes(groups("a", 2, tp_size=2, dp_size=2))
    assert [(lane.group.replica, lane.ranks, lane.output_rank) for lane in lanes] == [
        (0, (0, 1), 0),
        (0, (2, 3), 2),
        (1, (0, 1), 0),
        (1, (2, 3), 2),
    ]
    assert [lane.label for lane in lanes] == ["a[0]", "a[1]", "a[2]", "a[3]"]


def test_the_last_pipeline_stage_gives_the_result():
    (lane,) = build_lanes(groups("a", 1, tp_size=2, pp_size=2))
    assert (lane.ranks, lane.output_rank) == ((0, 1, 2, 3), 2)


def test_a_lane_is_taken_once_until_it_is_given_back():
    pool = LanePool({"a": groups("a", 2)})
    first, second = pool.acquire("a"), pool.acquire("a")
    assert first is not None
    assert second is not None
    assert (first.index, second.index) == (0, 1)
    assert pool.acquire("a") is None
    pool.release(second)
    again = pool.acquire("a")
    assert again is second


def test_all_lanes_are_taken_together_or_not_at_all():
    pool = LanePool({"a": groups("a", 2)})
    one = pool.acquire("a")
    assert one is not None
    assert pool.acquire_all("a") is None
    pool.release(one)
    assert pool.acquire_all("a") == pool.lanes("a")
    assert pool.acquire("a") is None


def test_a_colocated_partner_blocks_the_model_until_it_is_done():
    pool = LanePool({"a": groups("a", 2), "b": groups("b", 1), "c": groups("c", 1)}, [("a", "b")])
    one, two = pool.acquire("a"), pool.acquire("a")
    assert one is not None
    assert two is not None
    assert pool.acquire("b") is None
    assert pool.acquire_all("b") is None
    assert pool.acquire("c") is not None
    pool.release(one)
    assert pool.acquire("b") is None
    pool.release(two)
    assert pool.acquire("b") is not None
