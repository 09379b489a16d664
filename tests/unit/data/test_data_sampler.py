"""Which prompts an episode draws."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.data.rows import RowId
from chatlearn.data.sampler import DrawnPrompt, PromptSampler, SamplerState, expand_samples
from chatlearn.errors import DataError


def indices(sampler, count):
    return [prompt.index for prompt in sampler.draw(count)]


def test_no_prompt_comes_twice_within_an_epoch_of_35_drawn_by_8():
    sampler = PromptSampler([35], seed=1)
    drawn = [prompt for _ in range(35) for prompt in sampler.draw(8)]
    assert [prompt.number for prompt in drawn] == list(range(280))
    for epoch in range(8):
        chosen = [prompt.index for prompt in drawn[35 * epoch : 35 * (epoch + 1)]]
        assert sorted(chosen) == list(range(35))


def test_every_epoch_and_every_seed_is_shuffled_anew():
    sampler = PromptSampler([35], seed=1)
    epochs = [tuple(indices(sampler, 35)) for _ in range(4)]
    assert len({*epochs, tuple(range(35))}) == 5
    assert tuple(indices(PromptSampler([35], seed=1), 35)) == epochs[0]
    assert tuple(indices(PromptSampler([35], seed=2), 35)) != epochs[0]


def test_without_shuffling_the_order_is_that_of_the_file():
    assert indices(PromptSampler([3], shuffle=False), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_the_size_of_a_draw_does_not_matter():
    by_eight, by_five = PromptSampler([35], seed=3), PromptSampler([35], seed=3)
    assert sum((by_eight.draw(8) for _ in range(10)), []) == sum(
        (by_five.draw(5) for _ in range(16)), []
    )


def test_data_sets_are_mixed_by_ratio_throughout():
    sampler = PromptSampler([10, 100], [1, 3], shuffle=False)
    drawn = [prompt.dataset_index for prompt in sampler.draw(40)]
    assert Counter(drawn) == {0: 10, 1: 30}
    assert all(Counter(drawn[at : at + 4]) == {0: 1, 1: 3} for at in range(0, 40, 4))


def test_without_a_ratio_data_sets_are_drawn_by_their_lengths():
    drawn = PromptSampler([2, 6]).draw(8)
    assert sorted((p.dataset_index, p.index) for p in drawn) == [
        *((0, at) for at in range(2)),
        *((1, at) for at in range(6)),
    ]


@given(st.integers(0, 90), st.integers(1, 40))
def test_a_restored_sampler_goes_on_where_the_other_stood(before, after):
    first = PromptSampler([7, 13], [2, 1], seed=5)
    first.draw(before)
    second = PromptSampler([7, 13], [2, 1], seed=5)
    second.restore(first.state)
    assert first.draw(after) == second.draw(after)


def test_a_state_of_other_data_sets_is_refused():
    with pytest.raises(DataError, match="saved position is of 1 data sets, there are 2"):
        PromptSampler([3, 4]).restore(SamplerState(5, (5,)))


def test_an_empty_data_set_and_a_ratio_of_another_length_are_refused():
    for lengths in ([], [3, 0]):
        with pytest.raises(DataError, match="every data set needs at least one prompt"):
            PromptSampler(lengths)
    with pytest.raises(DataError, match="data_ratio has 3 numbers for 2 data sets"):
        PromptSampler([3, 4], [1, 1, 1])


def test_samples_of_a_prompt_stand_side_by_side():
    prompts = [DrawnPrompt(8, 0, 3), DrawnPrompt(9, 0, 1)]
    assert expand_samples(prompts, 2) == [
        (RowId(8, 0), prompts[0]),
        (RowId(8, 1), prompts[0]),
        (RowId(9, 0), prompts[1]),
        (RowId(9, 1), prompts[1]),
    ]
