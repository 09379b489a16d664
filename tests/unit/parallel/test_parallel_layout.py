"""The layout: rank <-> coordinates, lanes, data-parallel groups."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout, RankCoordinates

SIZES = st.integers(1, 4)
LAYOUTS = st.builds(ParallelLayout, tp_size=SIZES, pp_size=SIZES, dp_size=SIZES, cp_size=SIZES)


@given(LAYOUTS)
def test_ranks_and_coordinates_are_each_others_inverse(layout):
    ranks = range(layout.world_size)
    found = [layout.coordinates(rank) for rank in ranks]
    assert len(set(found)) == layout.world_size
    assert [layout.rank_of(at) for at in found] == list(ranks)


def test_tensor_ranks_are_neighbours_and_pipeline_ranks_are_furthest_apart():
    layout = ParallelLayout(tp_size=2, pp_size=2, dp_size=3)
    assert layout.world_size == 12
    assert layout.coordinates(0) == RankCoordinates(0, 0, 0, 0)
    assert layout.coordinates(1) == RankCoordinates(1, 0, 0, 0)
    assert layout.coordinates(2) == RankCoordinates(0, 0, 1, 0)
    assert layout.coordinates(6) == RankCoordinates(0, 0, 0, 1)
    assert layout.coordinates(11) == RankCoordinates(1, 0, 2, 1)


def test_context_ranks_lie_between_tensor_and_data_ranks():
    layout = ParallelLayout(tp_size=2, cp_size=2, dp_size=2)
    assert layout.coordinates(2) == RankCoordinates(0, 1, 0, 0)
    assert layout.coordinates(4) == RankCoordinates(0, 0, 1, 0)


def test_a_lane_holds_the_ranks_that_see_the_same_rows():
    layout = ParallelLayout(tp_size=2, pp_size=2, dp_size=2)
    assert layout.lane_ranks(0) == (0, 1, 4, 5)
    assert layout.lane_ranks(1) == (2, 3, 6, 7)
    assert (layout.output_rank(0), layout.output_rank(1)) == (4, 6)


@given(LAYOUTS)
def test_lanes_part_the_world_and_hold_their_output_rank(layout):
    lanes = [layout.lane_ranks(dp_rank) for dp_rank in range(layout.dp_size)]
    assert sorted(rank for lane in lanes for rank in lane) == list(range(layout.world_size))
    for dp_rank, lane in enumerate(lanes):
        output = layout.coordinates(layout.output_rank(dp_rank))
        assert layout.output_rank(dp_rank) in lane
        assert output == RankCoordinates(0, 0, dp_rank, layout.pp_size - 1)


@given(LAYOUTS, st.data())
def test_data_parallel_ranks_differ_in_nothing_else(layout, data):
    rank = data.draw(st.integers(0, layout.world_size - 1))
    at = layout.coordinates(rank)
    group = layout.data_parallel_ranks(rank)
    assert rank in group
    assert len(group) == layout.dp_size
    for dp_rank, other in enumerate(map(layout.coordinates, group)):
        assert other == RankCoordinates(at.tp_rank, at.cp_rank, dp_rank, at.pp_rank)


def test_a_size_of_zero_and_a_rank_outside_are_refused():
    with pytest.raises(ConfigError, match="every size of a layout is 1 or more"):
        ParallelLayout(tp_size=0)
    with pytest.raises(ConfigError, match="1 or more"):
        ParallelLayout(vpp_size=0)
    with pytest.raises(ValueError, match="rank 2 is outside the layout's 2 ranks"):
        ParallelLayout(tp_size=2).coordinates(2)
