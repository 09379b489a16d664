"""Global batches cut to lanes and micro-batches by tokens."""

import random
import time

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from chatlearn.data.balance import (
    Limits,
    RowLoad,
    count_tokens,
    cut_batch,
    measure_loads,
    merge_loads,
)
from chatlearn.data.rows import RowId


def ids(*prompts):
    return [RowId(prompt, 0) for prompt in prompts]


def samples(num_prompts, per_prompt, prompt, response):
    """Rows of equal loads."""
    pairs = [RowId(p, s) for p in range(num_prompts) for s in range(per_prompt)]
    return dict.fromkeys(pairs, RowLoad(prompt, response))


def long_tailed(seed, num_prompts, per_prompt, sigma, prompt=0.0):
    draw = random.Random(seed)
    loads = {}
    for number in range(num_prompts):
        own = int(prompt * draw.lognormvariate(0, 0.5))
        for sample in range(per_prompt):
            response = max(1, int(200 * draw.lognormvariate(0, sigma)))
            loads[RowId(number, sample)] = RowLoad(own, response)
    return loads


def length(load):
    """Tokens of a row by itself."""
    return load.prompt + load.response


def lane_tokens(cut, loads):
    """Tokens that each lane computes, micro-batch after micro-batch."""
    return [sum(count_tokens(part, loads) for part in lane) for lane in cut]


def least_of_the_fullest(loads, lanes):
    """Tokens of the fullest lane, at least: a prompt of more is on several lanes, and in each."""
    groups = {}
    for row_id, load in loads.items():
        groups.setdefault((row_id.prompt, load.prompt), []).append(load.response)
    sizes = [(prompt, sum(responses)) for (_, prompt), responses in groups.items()]

    def is_enough(tokens):
        if any(prompt >= tokens for prompt, _ in sizes):
            return False
        parts = [max(1, -(-rest // (tokens - prompt))) for prompt, rest in sizes]
        pairs = zip(parts, sizes, strict=True)
        return sum(count * prompt + rest for count, (prompt, rest) in pairs) <= lanes * tokens

    tokens = sum(map(sum, sizes)) // lanes
    while not is_enough(tokens):
        tokens += max(1, tokens // 500)
    return tokens


def cost_beyond(cut, loads):
    """Tokens that giving a row of the fullest lane to the emptiest would cost, at least."""
    tokens = lane_tokens(cut, loads)
    fullest = cut[tokens.index(max(tokens))]
    return min(length(loads[row]) for part in fullest for row in part)


ROW_LOADS = st.dictionaries(
    st.builds(RowId, st.integers(0, 6), st.integers(0, 8)),
    st.builds(RowLoad, st.integers(0, 30), st.integers(0, 300)),
    max_size=40,
)
LIMITS = st.builds(Limits, st.none() | st.integers(1, 9), st.none() | st.integers(1, 400))


@settings(deadline=None)
@given(ROW_LOADS, st.integers(1, 6), LIMITS)
def test_every_row_occurs_once_and_every_lane_has_as_many_micro_batches(loads, lanes, limits):
    cut = cut_batch(list(loads), lanes, limits, loads)
    assert len(cut) == lanes
    assert sorted(row for lane in cut for part in lane for row in part) == sorted(loads)
    assert len({len(lane) for lane in cut}) == 1


@settings(deadline=None)
@given(ROW_LOADS, st.integers(1, 6), LIMITS)
def test_no_micro_batch_is_above_the_limits_unless_it_is_one_row(loads, lanes, limits):
    for lane in cut_batch(list(loads), lanes, limits, loads):
        for part in lane:
            if len(part) > 1:
                assert limits.rows is None or len(part) <= limits.rows
                assert limits.tokens is None or count_tokens(part, loads) <= limits.tokens


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.integers(32, 48), st.floats(0.2, 1.3), LIMITS)
def test_lanes_are_within_5_per_cent_on_long_tailed_lengths(seed, lanes, per_lane, sigma, limits):
    loads = long_tailed(seed, lanes * per_lane, 1, sigma)
    tokens = lane_tokens(cut_batch(list(loads), lanes, limits, loads), loads)
    mean = sum(tokens) / lanes
    assume(max(load.response for load in loads.values()) <= mean)
    assert max(tokens) <= 1.05 * mean


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 8), st.sampled_from([2, 4, 8, 16, 32]))
def test_lanes_are_within_5_per_cent_where_samples_share_prompts(seed, lanes, per_prompt):
    loads = long_tailed(seed, lanes * 32 // per_prompt, per_prompt, 1.0, prompt=150.0)
    limits = Limits(tokens=4096)
    tokens = lane_tokens(cut_batch(list(loads), lanes, limits, loads), loads)
    mean = sum(tokens) / lanes
    assume(max(map(length, loads.values())) <= mean)
    assert max(tokens) <= 1.05 * mean
    # Few prompts are computed on two lanes.
    alone = lane_tokens(cut_batch(list(loads), 1, limits, loads), loads)
    assert sum(tokens) <= 1.05 * sum(alone)


PROMPTS = st.sampled_from([50.0, 300.0, 2000.0])
SAMPLES = st.sampled_from([8, 16, 32])
WIDE_LIMITS = st.sampled_from([Limits(), Limits(rows=8), Limits(tokens=2048), Limits(tokens=8192)])


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 15), SAMPLES, PROMPTS, WIDE_LIMITS)
def test_lanes_are_even_where_another_lane_could_compute_a_prompt_too(
    seed, lanes, per_prompt, prompt, limits
):
    loads = long_tailed(seed, -(-lanes * 32 // per_prompt), per_prompt, 1.0, prompt)
    cut = cut_batch(list(loads), lanes, limits, loads)
    tokens = lane_tokens(cut, loads)
    is_even = max(tokens) <= 1.05 * sum(tokens) / lanes
    assert is_even or max(tokens) - min(tokens) <= cost_beyond(cut, loads)


@pytest.mark.parametrize("limits", [Limits(rows=8), Limits(tokens=2048), Limits(tokens=8192)])
@pytest.mark.parametrize("per_prompt", [8, 16, 32])
@pytest.mark.parametrize("lanes", [2, 5, 8, 15])
def test_micro_batches_of_long_prompts_sum_up_to_even_lanes(lanes, per_prompt, limits):
    for seed in range(3):
        loads = long_tailed(seed, -(-lanes * 32 // per_prompt), per_prompt, 0.8, prompt=2000.0)
        cut = cut_batch(list(loads), lanes, limits, loads)
        tokens = lane_tokens(cut, loads)
        assert max(map(length, loads.values())) <= sum(tokens) / lanes
        is_even = max(tokens) <= 1.05 * sum(tokens) / lanes
        # Of four prompts on two lanes a part of any costs more than the lanes differ by.
        is_beyond = lanes == 2 and max(tokens) - min(tokens) <= cost_beyond(cut, loads)
        assert is_even or is_beyond


@pytest.mark.parametrize("prompt", [300.0, 2000.0])
@pytest.mark.parametrize("per_prompt", [8, 16, 32])
@pytest.mark.parametrize("lanes", [3, 6, 10, 15])
def test_the_fullest_lane_without_limits_is_near_the_least_that_can_be(lanes, per_prompt, prompt):
    for seed in range(3):
        loads = long_tailed(seed, -(-lanes * 32 // per_prompt), per_prompt, 0.8, prompt)
        tokens = lane_tokens(cut_batch(list(loads), lanes, Limits(), loads), loads)
        assert max(tokens) <= 1.11 * least_of_the_fullest(loads, lanes)


def test_a_prompt_for_each_lane_is_divided_where_one_is_long():
    loads = long_tailed(1, 64, 64, 0.5, prompt=3000.0)
    tokens = lane_tokens(cut_batch(list(loads), 64, Limits(), loads), loads)
    assert max(tokens) <= 1.05 * sum(tokens) / 64
    assert max(tokens) <= 1.05 * least_of_the_fullest(loads, 64)


def test_a_large_batch_is_cut_in_well_under_a_second():
    loads = long_tailed(0, 256, 16, 1.3, prompt=2000.0)
    begin_s = time.process_time()
    cut_batch(list(loads), 64, Limits(tokens=8192), loads)
    assert time.process_time() - begin_s < 1.0


@settings(deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_the_cut_depends_on_the_batch_alone(seed, shuffler):
    loads = long_tailed(seed, 12, 4, 1.0, prompt=100.0)
    row_ids = list(loads)
    pairs = list(loads.items())
    shuffler.shuffle(pairs)
    limits = Limits(tokens=2000)
    assert cut_batch(row_ids, 3, limits, dict(pairs)) == cut_batch(row_ids, 3, limits, loads)


def test_rows_of_equal_length_stay_in_order():
    for loads in ({}, dict.fromkeys(ids(*range(7)), RowLoad(0, 9))):
        assert cut_batch(ids(*range(7)), 2, Limits(rows=2), loads) == (
            ((RowId(0, 0), RowId(1, 0)), (RowId(2, 0), RowId(3, 0))),
            ((RowId(4, 0), RowId(5, 0)), (RowId(6, 0),)),
        )


def test_a_lane_without_rows_has_empty_micro_batches():
    assert cut_batch(ids(0), 2, Limits(rows=4)) == (((RowId(0, 0),),), ((),))
    assert cut_batch([], 2, Limits(tokens=4)) == (((),), ((),))


def test_the_longest_rows_go_to_different_lanes():
    loads = dict(zip(ids(0, 1, 2, 3), [RowLoad(0, n) for n in (90, 80, 10, 20)], strict=True))
    cut = cut_batch(list(loads), 2, Limits(rows=4), loads)
    assert cut == ((tuple(ids(0, 2)),), (tuple(ids(1, 3)),))


def test_samples_of_one_prompt_stay_in_one_lane_and_micro_batch():
    loads = samples(num_prompts=6, per_prompt=3, prompt=50, response=10)
    cut = cut_batch(list(loads), 2, Limits(tokens=165), loads)
    parts = [part for lane in cut for part in lane]
    assert [len(lane) for lane in cut] == [2, 2]
    assert all(len({row.prompt for row in part}) * 3 == len(part) for part in parts)


def test_a_prompt_larger_than_a_lanes_share_is_split():
    loads = samples(num_prompts=1, per_prompt=8, prompt=10, response=10)
    cut = cut_batch(list(loads), 2, Limits(rows=8), loads)
    assert lane_tokens(cut, loads) == [50, 50]


def test_a_row_above_the_budget_is_a_micro_batch_by_itself():
    loads = dict(zip(ids(0, 1, 2), [RowLoad(3, 4), RowLoad(500, 5), RowLoad(3, 4)], strict=True))
    (lane,) = cut_batch(list(loads), 1, Limits(tokens=14), loads)
    assert lane == (tuple(ids(0, 2)), tuple(ids(1)))


def test_different_beginnings_of_one_prompts_samples_are_not_shared():
    loads = {RowId(0, 0): RowLoad(10, 1), RowId(0, 1): RowLoad(10, 2), RowId(0, 2): RowLoad(7, 1)}
    assert count_tokens(loads, loads) == 10 + 1 + 2 + 7 + 1


def test_a_model_that_shares_no_prompts_computes_one_with_every_response():
    loads = samples(num_prompts=1, per_prompt=8, prompt=1000, response=10)
    limits = Limits(tokens=2100)
    cut = cut_batch(list(loads), 2, limits, loads, shares_prompts=False)
    assert [[len(part) for part in lane] for lane in cut] == [[2, 2], [2, 2]]
    pairs = {row: load._replace(copies=2) for row, load in loads.items()}
    (lane,) = cut_batch(list(pairs), 1, limits, pairs, shares_prompts=False)
    assert [len(part) for part in lane] == [1] * 8
    ((part,),) = cut_batch(list(pairs), 1, limits, pairs)
    assert len(part) == 8


def test_a_row_without_tokens_counts_as_one():
    assert count_tokens(ids(0, 1), {RowId(0, 0): RowLoad(0, 0)}) == 2


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": ["a"]}, ()),
        ({"prompt_token_ids": [[1, 2], [3]]}, (RowLoad(2, 0), RowLoad(1, 0))),
        (
            {"prompt_token_ids": [[1]], "response_token_ids": [torch.tensor([4, 5])]},
            (RowLoad(1, 2),),
        ),
        (
            {
                "prompt_token_ids": [[1]],
                "chosen_token_ids": [[1, 2]],
                "rejected_token_ids": [[1, 2, 3]],
            },
            (RowLoad(1, 5, 2),),
        ),
        ({"response_token_ids": [7]}, (RowLoad(0, 0),)),
    ],
)
def test_loads_are_lengths_of_token_ids(columns, expected):
    assert measure_loads(columns) == expected


def test_a_row_that_lies_in_two_places_has_the_parts_of_both():
    assert merge_loads([RowLoad(3, 0), RowLoad(3, 5), RowLoad(0, 5)]) == RowLoad(3, 5)
    assert merge_loads([]) == RowLoad(0, 0)
