"""GAE, group advantages and whitening on numbers worked out by hand."""

import pytest
import torch

from chatlearn.algorithms.advantages import (
    MaskedMoments,
    compute_gae,
    compute_group_advantages,
    compute_moments,
    whiten,
)

REWARDS = torch.tensor([[0.0, 0.0, 1.0]])
VALUES = torch.tensor([[0.5, 0.25, 0.75]])
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_gae_of_three_tokens():
    # deltas: 0.25 - 0.5, 0.75 - 0.25, 1 - 0.75; each advantage adds half of the next one.
    found = compute_gae(REWARDS, VALUES, ALL, gamma=1.0, lam=0.5)
    assert found.advantages.tolist() == [[0.0625, 0.625, 0.25]]
    assert found.returns.tolist() == [[0.5625, 0.875, 1.0]]


def test_gae_discounts_the_next_value_and_the_next_advantage():
    # deltas: 0.125 - 0.5, 0.375 - 0.25, 0.25; gamma * lam = 0.5.
    found = compute_gae(REWARDS, VALUES, ALL, gamma=0.5, lam=1.0)
    assert found.advantages.tolist() == [[-0.25, 0.25, 0.25]]
    assert found.returns.tolist() == [[0.25, 0.5, 1.0]]


def test_gae_with_lambda_zero_is_the_one_step_difference():
    found = compute_gae(REWARDS, VALUES, ALL, gamma=1.0, lam=0.0)
    assert found.advantages.tolist() == [[-0.25, 0.5, 0.25]]


def test_gae_with_lambda_one_returns_the_sum_of_later_rewards():
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    found = compute_gae(rewards, VALUES, ALL, gamma=1.0, lam=1.0)
    assert found.returns.tolist() == [[7.0, 6.0, 4.0]]


def test_gae_skips_masked_tokens_as_if_they_were_not_there():
    mask = torch.tensor([[False, True, False, True, True, False]])
    rewards = torch.tensor([[9.0, 0.0, 9.0, 0.0, 1.0, 9.0]])
    values = torch.tensor([[9.0, 0.5, 9.0, 0.25, 0.75, 9.0]])
    found = compute_gae(rewards, values, mask, gamma=1.0, lam=0.5)
    assert found.advantages.tolist() == [[0.0, 0.0625, 0.0, 0.625, 0.25, 0.0]]
    assert found.returns.tolist() == [[0.0, 0.5625, 0.0, 0.875, 1.0, 0.0]]


def test_gae_refuses_shapes_that_differ_and_factors_out_of_range():
    with pytest.raises(ValueError, match=r"rewards \(1, 3\).* must have one shape"):
        compute_gae(REWARDS, VALUES[:, :2], ALL, gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], got 1.5 and 1.0"):
        compute_gae(REWARDS, VALUES, ALL, gamma=1.5, lam=1.0)


@pytest.mark.parametrize(
    ("normalization", "expected"),
    [
        ("none", [-1.0, -3.0, 1.0, 3.0]),
        ("leave_one_out", [-2.0, -6.0, 2.0, 6.0]),
        ("population_std", [-1 / 1.00001, -3 / 3.00001, 1 / 1.00001, 3 / 3.00001]),
        ("unbiased_std", [-1 / 2**0.5, -3 / 18**0.5, 1 / 2**0.5, 3 / 18**0.5]),
    ],
)
def test_group_advantages_are_relative_to_the_prompts_own_samples(normalization, expected):
    rewards = torch.tensor([1.0, 0.0, 3.0, 6.0])
    groups = torch.tensor([7, 2, 7, 2])
    found = compute_group_advantages(rewards, groups, normalization=normalization)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=2e-6, atol=0)


@pytest.mark.parametrize("normalization", ["none", "leave_one_out", "population_std"])
def test_group_advantages_of_one_sample_are_zero(normalization):
    found = compute_group_advantages(
        torch.tensor([5.0, 2.0]), torch.tensor([0, 1]), normalization=normalization
    )
    assert found.tolist() == [0.0, 0.0]


def test_group_advantages_refuse_an_unknown_normalization_and_wrong_shapes():
    with pytest.raises(ValueError, match="population_std, unbiased_std, .* got 'std'"):
        compute_group_advantages(torch.ones(2), torch.zeros(2), normalization="std")
    with pytest.raises(ValueError, match=r"are both \[batch\]"):
        compute_group_advantages(torch.ones(2, 1), torch.zeros(2, 1))


def test_moments_of_parts_add_up_to_those_of_the_whole():
    values = torch.tensor([[1.0, 2.0, 50.0], [3.0, 6.0, 50.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    parts = [compute_moments(values[at : at + 1], mask[at : at + 1]) for at in (0, 1)]
    added = MaskedMoments(
        sum(p.count for p in parts),
        sum(p.total for p in parts),
        sum(p.total_squares for p in parts),
    )
    assert added == compute_moments(values, mask) == MaskedMoments(4.0, 12.0, 50.0)
    assert added.mean == 3.0
    assert added.std == 3.5**0.5


def test_moments_without_entries_are_zero():
    found = compute_moments(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert (found.mean, found.std) == (0.0, 0.0)


def test_whitening_gives_zero_mean_and_unit_deviation_and_zero_where_masked():
    values = torch.tensor([[1.0, 3.0, 50.0]])
    mask = torch.tensor([[True, True, False]])
    found = whiten(values, mask, compute_moments(values, mask))
    torch.testing.assert_close(found, torch.tensor([[-1.0, 1.0, 0.0]]))
