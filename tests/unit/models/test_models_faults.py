"""Numbers beyond their limits are found, the gravest first."""

import math

import pytest

from chatlearn.config.guards import GuardsConfig
from chatlearn.models.faults import find_fault, find_reward_fault

GUARDS = GuardsConfig(
    kl_limit=0.5,
    update_kl_limit=0.1,
    ratio_gap_limit=2.0,
    logprob_gap_limit=0.05,
    grad_norm_limit=100.0,
)


@pytest.mark.parametrize(
    ("numbers", "name", "action"),
    [
        ({"loss": math.nan}, "loss", "stop"),
        ({"value_loss": -math.inf}, "value_loss", "stop"),
        ({"grad_norm": math.inf}, "grad_norm", "stop"),
        ({"kl": 0.6}, "kl", "stop"),
        ({"update_kl": 0.2}, "update_kl", "skip"),
        ({"ratio_gap": 3.0}, "ratio_gap", "skip"),
        ({"logprob_gap": 0.06}, "logprob_gap", "warn"),
        ({"grad_norm": 101.0}, "grad_norm", "skip"),
        ({"logprob_gap": 0.06, "kl": 0.6, "update_kl": 0.2}, "kl", "stop"),
    ],
)
def test_a_number_beyond_its_limit_is_a_fault(numbers, name, action):
    fault = find_fault(GUARDS, numbers)
    assert (fault.name, fault.action) == (name, action)
    assert fault.text


def test_healthy_numbers_and_unknown_ones_are_none():
    numbers = {"loss": 1.0, "grad_norm": 100.0, "kl": 0.5, "entropy": math.nan, "kl_loss_x": 9.0}
    assert find_fault(GUARDS, numbers) is None
    assert find_fault(GuardsConfig(), {"kl": 1e9, "grad_norm": 1e9}) is None


def test_the_action_for_what_is_not_finite_is_the_configs():
    assert find_fault(GuardsConfig(not_finite="skip"), {"loss": math.nan}).action == "skip"


@pytest.mark.parametrize(
    ("reward", "best", "is_fault"),
    [(0.4, 1.0, True), (0.5, 1.0, False), (None, 1.0, False), (0.0, None, False)],
)
def test_a_reward_that_collapses_is_a_fault(reward, best, is_fault):
    guards = GuardsConfig(reward_drop_limit=0.5, reward_drop_action="skip")
    fault = find_reward_fault(guards, reward, best)
    assert (fault is not None) is is_fault


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, False),
        ({"not_finite": "skip"}, True),
        ({"update_kl_limit": 1.0}, True),
        ({"kl_limit": 1.0}, False),
        ({"kl_limit": 1.0, "kl_action": "skip"}, True),
    ],
)
def test_whether_updates_may_be_left_out_follows_from_limits_and_actions(keys, expected):
    assert GuardsConfig(**keys).may_skip is expected
