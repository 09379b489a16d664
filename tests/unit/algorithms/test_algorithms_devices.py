"""Whatever is calculated with lies where the batch lies: shown on a device without memory."""

from types import SimpleNamespace

import pytest
import torch
import torch.fx.experimental._config as tracing

from chatlearn.algorithms.advantages import compute_gae
from chatlearn.algorithms.aggregate import BatchTotals
from chatlearn.algorithms.kl import estimate_kl
from chatlearn.algorithms.metrics import explained_variance_sums
from chatlearn.algorithms.rewards import spread_rewards
from chatlearn.config.schema import AlgorithmConfig
from megatron_adapters import losses

ROWS, LENGTH = 4, 5
TOTALS = BatchTotals(9.0, float(ROWS))


@pytest.fixture(autouse=True)
def _selects_all():
    """A mask without values selects all."""
    with tracing.patch(meta_nonzero_assume_all_nonzero=True):
        yield


def there(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype, device="meta")


def batch(**extras):
    mask = there(ROWS, LENGTH, dtype=torch.bool)
    found = {"loss_mask": mask.float(), **extras}
    return SimpleNamespace(extras=found, mask=mask, num_rows=ROWS)


def test_advantages_of_rewards_with_a_penalty():
    mask = there(ROWS, LENGTH, dtype=torch.bool)
    kl = estimate_kl(there(ROWS, LENGTH), there(ROWS, LENGTH), "k1")
    rewards = spread_rewards(there(ROWS), mask, kl, kl_coef=0.1)
    found = compute_gae(rewards, there(ROWS, LENGTH), mask, gamma=1.0, lam=0.9)
    assert found.advantages.is_meta
    assert found.returns.is_meta


def test_explained_variance():
    mask = there(ROWS, LENGTH, dtype=torch.bool)
    assert explained_variance_sums(there(ROWS, LENGTH), there(ROWS, LENGTH), mask).is_meta


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_losses_of_policy_and_value(aggregation):
    algorithm = AlgorithmConfig(loss_aggregation=aggregation)
    names = ("rollout_logprobs", "ref_logprobs", "advantages", "old_values", "returns")
    rows = batch(**{name: there(ROWS, LENGTH) for name in names})
    for loss, output in (
        (
            losses.build_policy_loss(algorithm, TOTALS, kl_in_loss=True, has_reference=True),
            there(2, ROWS, LENGTH),
        ),
        (losses.build_value_loss(algorithm, TOTALS), there(1, ROWS, LENGTH)),
        (losses.build_supervised_loss(TOTALS, aggregation), there(2, ROWS, LENGTH)),
    ):
        found = loss.function(output, rows)
        assert found.loss.is_meta
        assert found.kept.shape == (len(loss.names),)
        assert found.kept.is_meta


def test_losses_over_pairs():
    rows = batch(ref_logprobs=there(ROWS))
    for loss, output in (
        (losses.build_dpo_loss(0.1, 2.0), there(2, ROWS, LENGTH)),
        (losses.build_pairwise_loss(2.0), there(1, ROWS, 1)),
    ):
        found = loss.function(output, rows)
        assert found.loss.is_meta
        assert found.kept.shape == (len(loss.names),)
