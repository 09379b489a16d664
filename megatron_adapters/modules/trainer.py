# pyright: standard, reportPrivateImportUsage=false
"""TrainerModule: what every Megatron trainer does around its loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from chatlearn.algorithms.advantages import (
    AdvantagesAndReturns,
    MaskedMoments,
    compute_gae,
    compute_moments,
)
from chatlearn.algorithms.aggregate import BatchTotals
from chatlearn.algorithms.kl import estimate_kl
from chatlearn.algorithms.rewards import spread_rewards
from chatlearn.config.schema import AlgorithmConfig
from chatlearn.errors import NumericsError
from chatlearn.models.faults import find_fault
from megatron_adapters.batches import Rows, read_rows, read_temperature
from megatron_adapters.losses import TrainLoss
from megatron_adapters.modules.base import MegatronModule
from megatron_adapters.modules.text_rows import build_text_dataset
from megatron_adapters.packing import PackedBatch
from megatron_adapters.training import (
    StepResult,
    TrainingState,
    has_finite_weights,
    reduce_over_data,
    train_batch,
)

__all__ = ["TrainerModule", "kl_enters"]

Columns = dict[str, Any]


def kl_enters(algorithm: AlgorithmConfig, *, has_critic: bool) -> str:
    """Where the KL enters: `reward`, `loss` or `none`; resolves `kl_in: auto`."""
    if algorithm.kl_coef == 0:
        return "none"
    if algorithm.kl_in == "auto":
        return "reward" if has_critic else "loss"
    return algorithm.kl_in


class TrainerModule(MegatronModule):
    """A trained model. Every rank of a data-parallel copy gets the same micro-batches."""

    is_trained = True
    guards_updates = True

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Sequence[Any]:
        """Rows with token ids beside their text; see `tokenize_rows`."""
        del is_eval
        return build_text_dataset(self, prompts)

    @property
    def algorithm(self) -> AlgorithmConfig:
        """`runtime.algorithm`."""
        return self.runtime_args.algorithm

    @property
    def state(self) -> TrainingState:
        """Optimizer and schedule."""
        return self._attached(self.training)

    def update(self, batches: Sequence[PackedBatch], loss: TrainLoss) -> dict[str, float]:
        """One optimizer step; gives the loss's sums by name with gradient norm and rate.

        Raises:
            NumericsError: a number is beyond its limit, and that ends the run, on every rank; or
                weights are not finite, on the ranks that hold them.
        """

        def check(sums: torch.Tensor, norm: float) -> bool:
            numbers = dict(zip(loss.names, sums.tolist(), strict=True))
            return self._heed_numbers({**numbers, "grad_norm": norm})

        result: StepResult = train_batch(self.state, batches, loss.function, len(loss.names), check)
        if self.runtime_args.guards.not_finite != "warn" and not has_finite_weights(self.state):
            raise NumericsError(
                f"model {self.name!r}: weights are not finite after the update: lower the learning "
                "rate, and go on from the last checkpoint"
            )
        sums = dict(zip(loss.names, result.sums.tolist(), strict=True))
        metrics = {**sums, "grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
        if self.runtime_args.guards.may_skip:
            metrics["skipped_step"] = float(result.is_skipped)
        return metrics

    def _heed_numbers(self, numbers: Mapping[str, float]) -> bool:
        """Whether to make the update, by what the numbers of the step are."""
        fault = find_fault(self.runtime_args.guards, numbers)
        if fault is None:
            return True
        self.report_fault(fault)
        if fault.action == "stop":
            raise NumericsError(f"model {self.name!r}: {fault.text}")
        return fault.action != "skip"

    def pack_responses(self, data: Sequence[Columns], *columns: str) -> list[PackedBatch]:
        """Pack micro-batches, and on the last stage align the named columns into their extras.

        A column may hold one number per row, one per response token, or be missing from the data
        (then it is left out); `rewards` stays [rows], the others become grids [rows, longest
        response]. The extra
        `loss_mask` is always there: response tokens, less those that a column `loss_mask`
        excludes.
        """
        rows = [read_rows(columns_of) for columns_of in data]
        batches = self.pack(rows, temperature=read_temperature(*data))
        if not self.groups.is_last_stage:
            return batches
        for batch, values in zip(batches, data, strict=True):
            batch.extras["loss_mask"] = batch.mask.float()
            for name in {*columns, "loss_mask"} & values.keys():
                batch.extras[name] = _align(batch, name, values[name])
            batch.extras["loss_mask"] *= batch.mask
        return batches

    def pack_pairs(self, data: Sequence[Columns], *columns: str) -> list[PackedBatch]:
        """Pack preference pairs: the chosen rows, then the rejected ones.

        On the last stage a column `x` becomes the extra `x` [rows] of `chosen_x` and `rejected_x`.
        """
        for values in data:
            self.require_columns(values, "prompt_token_ids", "chosen_token_ids")
            self.require_columns(values, "rejected_token_ids")
        rows = [_pair_rows(values) for values in data]
        batches = self.pack(rows, temperature=read_temperature(*data))
        if self.groups.is_last_stage:
            for batch, values in zip(batches, data, strict=True):
                for name in columns:
                    both = [*values[f"chosen_{name}"], *values[f"rejected_{name}"]]
                    batch.extras[name] = batch.per_row([float(value) for value in both])
        return batches

    def count_tokens(self, batches: Sequence[PackedBatch]) -> BatchTotals:
        """Trained tokens and sequences of the global batch, all data-parallel ranks together."""
        masks = [batch.extras.get("loss_mask", batch.mask).bool() for batch in batches]
        local = torch.tensor(
            [
                float(sum(int(mask.sum()) for mask in masks)),
                float(sum(int(mask.any(dim=1).sum()) for mask in masks)),
            ],
            device=self.device,
        )
        tokens, sequences = reduce_over_data(local, self.groups).tolist()
        return BatchTotals(tokens, sequences)

    def count_rows(self, data: Sequence[Columns]) -> float:
        """Rows of the global batch, all data-parallel ranks together."""
        local = sum(len(next(iter(columns.values()), ())) for columns in data)
        total = reduce_over_data(torch.tensor([float(local)], device=self.device), self.groups)
        return float(total.item())

    def global_moments(
        self, values: Sequence[torch.Tensor], masks: Sequence[torch.Tensor]
    ) -> MaskedMoments:
        """Moments over the whole global batch."""
        parts = [compute_moments(v, mask) for v, mask in zip(values, masks, strict=True)]
        local = torch.tensor(
            [[part.count, part.total, part.total_squares] for part in parts],
            dtype=torch.float64,
            device=self.device,
        ).sum(dim=0)
        return MaskedMoments(*reduce_over_data(local, self.groups).tolist())

    def estimate_returns(self, batch: PackedBatch) -> AdvantagesAndReturns:
        """GAE over the extras `rewards`, `values`, `rollout_logprobs` and `ref_logprobs`.

        The KL in the reward is that of the sampler's log-probabilities, which policy and value
        trainer share.
        """
        algorithm, extras = self.algorithm, batch.extras
        mask = extras["loss_mask"].bool()
        kl = None
        if kl_enters(algorithm, has_critic=True) == "reward":
            estimator = "k1" if algorithm.kl_estimator == "auto" else algorithm.kl_estimator
            kl = estimate_kl(extras["rollout_logprobs"], extras["ref_logprobs"], estimator)
        token_rewards = spread_rewards(extras["rewards"], mask, kl, kl_coef=algorithm.kl_coef)
        return compute_gae(
            token_rewards, extras["values"], mask, gamma=algorithm.gamma, lam=algorithm.lam
        )

    def require_rollout(self, data: Mapping[str, Any], *further: str) -> None:
        """Refuse a batch without what GAE needs."""
        needed = ["prompt_token_ids", "response_token_ids", "rollout_logprobs", "rewards", *further]
        if kl_enters(self.algorithm, has_critic=True) != "none":
            needed.append("ref_logprobs")
        self.require_columns(data, *needed)


def _align(batch: PackedBatch, name: str, column: Any) -> torch.Tensor:
    """A column as a grid: numbers per row are repeated over the row's tokens."""
    values = [torch.as_tensor(value, dtype=torch.float32) for value in column]
    if name == "rewards":
        return batch.per_row([float(value) for value in values])
    counts = batch.mask.sum(dim=1).tolist()
    spread = [
        value.expand(int(count)) if value.dim() == 0 else value
        for value, count in zip(values, counts, strict=False)
    ]
    return batch.align(spread)


def _pair_rows(values: Columns) -> Rows:
    prompts = list(values["prompt_token_ids"])
    responses = [*values["chosen_token_ids"], *values["rejected_token_ids"]]
    return Rows([*prompts, *prompts], responses)
