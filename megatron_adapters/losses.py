"""What the trainers minimise, as functions of a model's output and a packed micro-batch.

Every function gives a micro-batch's share of the global batch's loss and, beside it, sums that
become the metrics of the step when they are added over micro-batches and ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from chatlearn.algorithms.aggregate import BatchTotals, compute_token_weights
from chatlearn.algorithms.kl import estimate_kl
from chatlearn.algorithms.metrics import explained_variance_sums
from chatlearn.algorithms.policy_loss import compute_policy_loss
from chatlearn.algorithms.preference_loss import compute_dpo_loss, compute_pairwise_loss
from chatlearn.algorithms.value_loss import compute_value_loss
from chatlearn.config.schema import AlgorithmConfig
from megatron_adapters.packing import PackedBatch
from megatron_adapters.pipeline import MicroBatchResult

__all__ = [
    "TrainLoss",
    "build_dpo_loss",
    "build_pairwise_loss",
    "build_policy_loss",
    "build_supervised_loss",
    "build_value_loss",
]


@dataclass(frozen=True)
class TrainLoss:
    """A loss and the names of what it keeps.

    Attributes:
        names: of the sums, in order; the first is the loss.
        function: for one micro-batch.
    """

    names: tuple[str, ...]
    function: Callable[[torch.Tensor, PackedBatch], MicroBatchResult]


def build_policy_loss(
    algorithm: AlgorithmConfig,
    totals: BatchTotals,
    *,
    kl_in_loss: bool,
    has_reference: bool,
) -> TrainLoss:
    """The clipped policy loss with entropy bonus and, if asked for, the KL to the reference.

    The batch's extras: `loss_mask`, `old_logprobs`, `rollout_logprobs`, `advantages` and, where
    there is a reference, `ref_logprobs`, each [rows, length]. Besides the two losses it keeps
    means over the trained tokens: the entropy, the share that is clipped, |ratio - 1|
    (`ratio_gap`), the k3 KL to the old policy (`update_kl`) and to the reference (`kl`), and how
    far the old log-probabilities are from the sampler's (`logprob_gap`).
    """
    names = ("entropy", "clip_fraction", "ratio_gap", "update_kl", "logprob_gap")
    if has_reference:
        names = (*names, "kl")
    estimator = "k3" if algorithm.kl_estimator == "auto" else algorithm.kl_estimator

    def function(scores: torch.Tensor, batch: PackedBatch) -> MicroBatchResult:
        extras, (scored, entropy) = batch.extras, scores
        mask = extras["loss_mask"].bool()
        logprobs = torch.where(mask, scored, 0.0)
        old_logprobs = extras.get("old_logprobs", logprobs.detach())
        policy = compute_policy_loss(
            logprobs,
            old_logprobs,
            extras["advantages"],
            clip_ratio_low=algorithm.clip_ratio_low,
            clip_ratio_high=algorithm.clip_ratio_high,
        )
        weights = compute_token_weights(mask, algorithm.loss_aggregation, totals)
        policy_loss = (policy.loss * weights).sum()
        loss = policy_loss - algorithm.entropy_coef * (entropy * weights).sum()
        if kl_in_loss:
            kl = estimate_kl(logprobs, extras["ref_logprobs"], estimator)
            loss = loss + algorithm.kl_coef * (kl * weights).sum()
        means = compute_token_weights(mask, "token_mean", totals)
        current = logprobs.detach()
        per_token = [
            entropy.detach(),
            policy.is_clipped.float(),
            (policy.ratio - 1.0).abs(),
            estimate_kl(current, old_logprobs, "k3"),
            (old_logprobs - extras["rollout_logprobs"]).abs(),
        ]
        if has_reference:
            per_token.append(estimate_kl(current, extras["ref_logprobs"], "k3"))
        kept = [loss.detach(), policy_loss.detach(), *((v * means).sum() for v in per_token)]
        return MicroBatchResult(loss, torch.stack(kept))

    return TrainLoss(("loss", "policy_loss", *names), function)


def build_supervised_loss(totals: BatchTotals, aggregation: str) -> TrainLoss:
    """Cross entropy of the response tokens; extras: `loss_mask` [rows, length]."""

    def function(scores: torch.Tensor, batch: PackedBatch) -> MicroBatchResult:
        mask = batch.extras["loss_mask"].bool()
        weights = compute_token_weights(mask, aggregation, totals)
        loss = -(scores[0] * weights).sum()
        return MicroBatchResult(loss, loss.detach().reshape(1))

    return TrainLoss(("loss",), function)


def build_dpo_loss(beta: float, num_pairs: float) -> TrainLoss:
    """DPO over pairs: a batch's first half of real rows are the chosen, the second the rejected.

    Extras: `ref_logprobs` [rows], summed over each response.
    """

    def function(scores: torch.Tensor, batch: PackedBatch) -> MicroBatchResult:
        logprobs = torch.where(batch.mask, scores[0], 0.0).sum(dim=1)
        (chosen, rejected), (ref_chosen, ref_rejected) = (
            _halves(values, batch) for values in (logprobs, batch.extras["ref_logprobs"])
        )
        losses = compute_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
        loss = losses.sum() / max(num_pairs, 1.0)
        margins = (beta * (chosen - ref_chosen - rejected + ref_rejected)).detach()
        sums = [margins.gt(0).float().sum() / num_pairs, margins.sum() / num_pairs]
        # The sum of an empty slice keeps the graph, so that ranks without rows take part.
        return MicroBatchResult(loss + 0.0 * logprobs.sum(), torch.stack([loss.detach(), *sums]))

    return TrainLoss(("loss", "accuracy", "margin"), function)


def build_value_loss(algorithm: AlgorithmConfig, totals: BatchTotals) -> TrainLoss:
    """The clipped value loss; extras: `loss_mask`, `old_values`, `returns`, each [rows, length]."""

    def function(output: torch.Tensor, batch: PackedBatch) -> MicroBatchResult:
        extras = batch.extras
        mask = extras["loss_mask"].bool()
        values = torch.where(mask, output[0], 0.0)
        losses = compute_value_loss(
            values, extras["old_values"], extras["returns"], algorithm.value_clip
        )
        weights = compute_token_weights(mask, algorithm.loss_aggregation, totals)
        loss = algorithm.value_loss_coef * (losses * weights).sum()
        # How well the values that the advantages were made of explain the returns.
        variance = explained_variance_sums(extras["old_values"], extras["returns"], mask)
        return MicroBatchResult(loss, torch.cat([loss.detach().double().reshape(1), variance]))

    names = ("loss", "count", "returns", "returns_squared", "errors", "errors_squared")
    return TrainLoss(names, function)


def build_pairwise_loss(num_pairs: float) -> TrainLoss:
    """The reward model's loss over pairs, laid out as for `build_dpo_loss`."""

    def function(output: torch.Tensor, batch: PackedBatch) -> MicroBatchResult:
        rewards = output[0].squeeze(-1)
        chosen, rejected = _halves(rewards, batch)
        loss = compute_pairwise_loss(chosen, rejected).sum() / max(num_pairs, 1.0)
        margins = (chosen - rejected).detach()
        sums = [margins.gt(0).float().sum() / num_pairs, margins.sum() / num_pairs]
        return MicroBatchResult(loss + 0.0 * rewards.sum(), torch.stack([loss.detach(), *sums]))

    return TrainLoss(("loss", "accuracy", "margin"), function)


def _halves(values: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-row values of the chosen and of the rejected rows."""
    half = batch.num_rows // 2
    return values[:half], values[half : batch.num_rows]
