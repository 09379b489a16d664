"""KL estimates, token rewards, losses and their weights on numbers worked out by hand."""

from math import exp, log

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.algorithms.aggregate import BatchTotals, compute_token_weights
from chatlearn.algorithms.kl import estimate_kl
from chatlearn.algorithms.metrics import (
    explained_variance_from_sums,
    explained_variance_sums,
    token_logprobs,
)
from chatlearn.algorithms.policy_loss import compute_policy_loss, compute_rollout_weights
from chatlearn.algorithms.preference_loss import compute_dpo_loss, compute_pairwise_loss
from chatlearn.algorithms.rewards import spread_rewards
from chatlearn.algorithms.value_loss import compute_value_loss


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -1.0, 0.0]),
        ("k2", [0.125, 0.5, 0.0]),
        ("k3", [exp(-0.5) - 0.5, exp(1.0) - 2.0, 0.0]),
    ],
)
def test_kl_estimates(estimator, expected):
    logprobs, ref_logprobs = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    found = estimate_kl(logprobs, ref_logprobs, estimator)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_kl_estimator_must_be_known():
    with pytest.raises(ValueError, match="k1, k2 or k3, got 'k4'"):
        estimate_kl(torch.zeros(1), torch.zeros(1), "k4")


def test_k3_keeps_its_precision_near_zero():
    found = estimate_kl(torch.tensor([1e-4]), torch.tensor([0.0]), "k3")
    assert found.item() == pytest.approx(5e-9, rel=0.05)


def test_rewards_go_to_the_last_trained_token_and_the_penalty_to_every_one():
    mask = torch.tensor([[False, True, True, False], [True, True, True, True]])
    kl = torch.tensor([[9.0, 1.0, 2.0, 9.0], [0.0, 1.0, 0.0, 4.0]])
    found = spread_rewards(torch.tensor([3.0, -1.0]), mask, kl, kl_coef=0.5)
    assert found.tolist() == [[0.0, -0.5, 2.0, 0.0], [0.0, -0.5, 0.0, -3.0]]


def test_rewards_without_a_penalty_and_without_a_trained_token():
    mask = torch.tensor([[True, False], [False, False]])
    found = spread_rewards(torch.tensor([2.0, 5.0]), mask)
    assert found.tolist() == [[2.0, 0.0], [0.0, 0.0]]


def test_policy_loss_clips_only_where_the_ratio_has_moved_too_far_for_the_better():
    ratios = [1.0, 1.5, 1.5, 0.5, 0.5, 1.25]
    found = compute_policy_loss(
        torch.tensor([[log(r) for r in ratios]]),
        torch.zeros(1, 6),
        torch.tensor([[2.0, 1.0, -1.0, 1.0, -1.0, 1.0]]),
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
    )
    torch.testing.assert_close(found.loss, torch.tensor([[-2.0, -1.3, 1.5, -0.5, 0.8, -1.25]]))
    torch.testing.assert_close(found.ratio, torch.tensor([ratios]))
    assert found.is_clipped.tolist() == [[False, True, False, False, True, False]]


def test_a_clipped_token_has_no_gradient():
    logprobs = torch.tensor([[log(1.5), log(1.1)]], requires_grad=True)
    found = compute_policy_loss(
        logprobs, torch.zeros(1, 2), torch.ones(1, 2), clip_ratio_low=0.2, clip_ratio_high=0.2
    )
    found.loss.sum().backward()
    assert logprobs.grad is not None
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -1.1]]))
    assert not found.ratio.requires_grad


def test_rollout_weights_are_old_over_sampled_probability_up_to_the_cap():
    old = torch.tensor([[log(0.3), log(0.1), log(0.9), 0.0]], requires_grad=True)
    sampled = torch.tensor([[log(0.2), log(0.4), log(0.2), 0.0]])
    found = compute_rollout_weights(old, sampled, 2.0)
    torch.testing.assert_close(found, torch.tensor([[1.5, 0.25, 2.0, 1.0]]))
    assert not found.requires_grad


def test_value_loss_takes_the_larger_error_of_plain_and_clipped_prediction():
    values, old_values = torch.tensor([[2.0, 2.0, 0.5]]), torch.tensor([[1.0, 1.0, 0.0]])
    returns = torch.tensor([[3.0, 0.0, 1.0]])
    clipped = compute_value_loss(values, old_values, returns, 0.5)
    assert clipped.tolist() == [[0.5 * 1.5**2, 0.5 * 2.0**2, 0.5 * 0.5**2]]
    plain = compute_value_loss(values, old_values, returns, None)
    assert plain.tolist() == [[0.5, 2.0, 0.125]]


def test_dpo_loss_is_log_two_without_preference_and_falls_with_the_margin():
    chosen, rejected = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -4.0])
    found = compute_dpo_loss(
        chosen, rejected, torch.tensor([-1.0, -2.0]), torch.tensor([-2.0, -3.0]), beta=0.5
    )
    expected = [log(2.0), log(1.0 + exp(-1.0))]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_pairwise_loss():
    found = compute_pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([log(2.0), log(1.0 + exp(2.0))]))


MASK = torch.tensor([[True, True, False, False], [True, False, False, False]])


@pytest.mark.parametrize(
    ("aggregation", "first", "second"),
    [("token_mean", 1 / 3, 1 / 3), ("sequence_mean", 1 / 4, 1 / 2), ("sequence_sum", 0.5, 0.5)],
)
def test_token_weights(aggregation, first, second):
    found = compute_token_weights(MASK, aggregation, BatchTotals(3.0, 2.0))
    expected = torch.tensor([[first, first, 0.0, 0.0], [second, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_token_weights_of_an_empty_batch_are_zero_and_an_unknown_name_is_refused():
    empty = torch.zeros(1, 2, dtype=torch.bool)
    for aggregation in ("token_mean", "sequence_mean", "sequence_sum"):
        found = compute_token_weights(empty, aggregation, BatchTotals(0.0, 0.0))
        assert found.tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match="sequence_sum, got 'mean'"):
        compute_token_weights(MASK, "mean", BatchTotals(3.0, 2.0))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=8),
    st.integers(0, 8),
    st.sampled_from(["token_mean", "sequence_mean", "sequence_sum"]),
)
def test_the_loss_does_not_depend_on_the_split_into_micro_batches(lengths, cut, aggregation):
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    losses = torch.arange(mask.numel(), dtype=torch.float32).reshape(mask.shape)
    totals = BatchTotals(float(mask.sum()), float(mask.any(1).sum()))
    whole = (compute_token_weights(mask, aggregation, totals) * losses).sum()
    # Padding to another width must not matter, either.
    wide = torch.nn.functional.pad(mask, (0, 2))
    parts = [(wide[:cut], losses[:cut]), (wide[cut:], losses[cut:])]
    split = sum(
        (compute_token_weights(m, aggregation, totals)[:, :6] * each).sum() for m, each in parts
    )
    torch.testing.assert_close(torch.as_tensor(split), whole)


def test_explained_variance_of_parts_is_that_of_the_whole():
    returns = torch.tensor([[1.0, 2.0, 9.0], [3.0, 4.0, 9.0]])
    values = torch.tensor([[1.0, 1.0, 0.0], [3.0, 3.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    parts = [
        explained_variance_sums(values[at : at + 1], returns[at : at + 1], mask[at : at + 1])
        for at in (0, 1)
    ]
    # Var[returns] = 1.25; the errors 0, 1, 0, 1 have variance 0.25.
    assert explained_variance_from_sums(parts[0] + parts[1]) == pytest.approx(0.8)


@pytest.mark.parametrize(("values", "expected"), [([1.0, 2.0], 1.0), ([5.0, 6.0], 1.0)])
def test_explained_variance_ignores_a_constant_offset(values, expected):
    mask = torch.ones(1, 2, dtype=torch.bool)
    sums = explained_variance_sums(torch.tensor([values]), torch.tensor([[1.0, 2.0]]), mask)
    assert explained_variance_from_sums(sums) == pytest.approx(expected)


def test_explained_variance_is_zero_where_returns_do_not_vary():
    mask = torch.ones(1, 2, dtype=torch.bool)
    sums = explained_variance_sums(torch.zeros(1, 2), torch.ones(1, 2), mask)
    assert explained_variance_from_sums(sums) == 0.0
    assert explained_variance_from_sums(torch.zeros(5)) == 0.0


def test_token_logprobs_of_two_tokens():
    logits = torch.tensor([[[0.0, log(3.0)], [0.0, 0.0]]])
    found = token_logprobs(logits, torch.tensor([[1, 0]]))
    torch.testing.assert_close(found, torch.tensor([[log(0.75), log(0.5)]]))
    warm = token_logprobs(logits, torch.tensor([[1, 0]]), temperature=0.5)
    torch.testing.assert_close(warm, torch.tensor([[log(0.9), log(0.5)]]))
