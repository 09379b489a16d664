"""PolicyTrainer: PPO, GRPO, DPO or supervised training, by what the rows hold."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from chatlearn.algorithms.advantages import whiten
from chatlearn.algorithms.policy_loss import compute_rollout_weights
from chatlearn.config.schema import AlgorithmConfig
from chatlearn.data.rows import RowId
from chatlearn.errors import ConfigError, DataError, NumericsError
from megatron_adapters.losses import (
    build_dpo_loss,
    build_policy_loss,
    build_supervised_loss,
)
from megatron_adapters.modules.trainer import Columns, TrainerModule, kl_enters
from megatron_adapters.packing import PackedBatch
from megatron_adapters.scoring import score_tokens_of_rows

__all__ = ["PolicyTrainer"]

_ROLLOUT_COLUMNS = ("rollout_logprobs", "ref_logprobs", "values", "rewards", "advantages")
_FIRST_UPDATE_KL = 1e-8


class PolicyTrainer(TrainerModule):
    """The policy that learns.

    The loss follows `runtime.algorithm.loss`; `auto` takes DPO for rows with `chosen_token_ids`,
    PPO for rows with `rewards` or `advantages` (GRPO is PPO on given `advantages`), and
    supervised training otherwise.
    """

    def setup(self) -> None:
        """Build model and optimizer."""
        super().setup()
        algorithm = self.algorithm
        self._old_logprobs: dict[RowId, torch.Tensor] = {}
        self._is_first_update = False
        is_scored = algorithm.old_logprobs != "rollout"
        self.needs_whole_episode = is_scored and algorithm.loss in ("auto", "ppo")

    def wants_whole_episode(self, columns: Sequence[str]) -> bool:
        """Only PPO has old log-probabilities, and a single update needs no score of them."""
        is_ppo = self.needs_whole_episode and self._choose_loss(columns) == "ppo"
        return is_ppo and self._is_scored_before()

    def _is_scored_before(self) -> bool:
        """Whether the old log-probabilities are scored before the episode's first update.

        With one update they are the current ones: the loss takes those.
        """
        algorithm = self.algorithm
        if algorithm.old_logprobs != "auto":
            return algorithm.old_logprobs == "recompute"
        return self.num_updates > 1 or algorithm.rollout_correction != "none"

    def prepare_episode(self, batches: list[list[Columns]]) -> None:
        """Score every response with the policy as it is before the episode's first update.

        The micro-batches are those of training, so that the first update sees the same numbers.
        """
        self._old_logprobs = {}
        self._is_first_update = True
        for data, row_ids in zip(batches, self.row_ids, strict=True):
            scores = score_tokens_of_rows(self.model, self.pack_responses(data), self.groups)
            ids = [row_id for some in row_ids for row_id in some]
            self._old_logprobs.update(zip(ids, scores, strict=bool(scores)))

    def step_state(self, micro_batches: Sequence[Sequence[RowId]]) -> dict[str, Any]:
        """The old log-probabilities of the step's rows."""
        ids = [row_id for some in micro_batches for row_id in some if row_id in self._old_logprobs]
        return {"old_logprobs": [[tuple(i), self._old_logprobs[i]] for i in ids]}

    def restore_step_state(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        found = {RowId(*row_id): value for row_id, value in state.get("old_logprobs", ())}
        self._old_logprobs = {**self._old_logprobs, **found}

    def train_step(self, data: list[Columns]) -> dict[str, float]:
        """One update on this rank's part of a global batch."""
        loss = self._choose_loss(data[0].keys())
        train = {"ppo": self._train_ppo, "dpo": self._train_dpo, "sft": self._train_supervised}
        return train[loss](data)

    def _choose_loss(self, columns: Collection[str]) -> str:
        given = self.algorithm.loss
        if given != "auto":
            return given
        if "chosen_token_ids" in columns:
            return "dpo"
        return "ppo" if {"rewards", "advantages"} & set(columns) else "sft"

    def _train_ppo(self, data: list[Columns]) -> dict[str, float]:
        has_critic = "advantages" not in data[0]
        entry = kl_enters(self.algorithm, has_critic=has_critic)
        self._require_columns(data[0], entry, has_critic=has_critic)
        batches = self.pack_responses(data, *_ROLLOUT_COLUMNS)
        totals = self.count_tokens(batches)
        if self.groups.is_last_stage:
            self._add_old_logprobs(batches)
            if has_critic:
                self._add_advantages(batches)
            _correct_for_rollout(self.algorithm, batches)
        loss = build_policy_loss(
            self.algorithm,
            totals,
            kl_in_loss=entry == "loss",
            has_reference="ref_logprobs" in data[0],
        )
        metrics = self.update(batches, loss)
        metrics["num_tokens"] = totals.num_tokens
        self._check_first_update(metrics)
        return metrics

    def _require_columns(self, data: Columns, entry: str, *, has_critic: bool) -> None:
        if has_critic:
            self.require_rollout(data, "values")
            return
        self.require_columns(data, "prompt_token_ids", "response_token_ids", "rollout_logprobs")
        if entry == "reward":
            raise ConfigError(
                "runtime.algorithm.kl_in: reward needs a critic, but the rows bring advantages of "
                "their own (GRPO): use kl_in: loss, or auto"
            )
        if entry == "loss":
            self.require_columns(data, "ref_logprobs")

    def _train_dpo(self, data: list[Columns]) -> dict[str, float]:
        for columns in data:
            self.require_columns(columns, "chosen_ref_logprobs", "rejected_ref_logprobs")
        batches = self.pack_pairs(data, "ref_logprobs")
        num_pairs = self.count_rows(data)
        loss = build_dpo_loss(self.algorithm.dpo_beta, num_pairs)
        return {**self.update(batches, loss), "num_pairs": num_pairs}

    def _train_supervised(self, data: list[Columns]) -> dict[str, float]:
        batches = self.pack_responses(data)
        totals = self.count_tokens(batches)
        loss = build_supervised_loss(totals, self.algorithm.loss_aggregation)
        return {**self.update(batches, loss), "num_tokens": totals.num_tokens}

    def _add_old_logprobs(self, batches: Sequence[PackedBatch]) -> None:
        """The denominator of the ratio, as `runtime.algorithm.old_logprobs` says."""
        if self.algorithm.old_logprobs == "rollout":
            for batch in batches:
                batch.extras["old_logprobs"] = batch.extras["rollout_logprobs"]
            return
        if not self._is_scored_before():
            return
        for batch, ids in zip(batches, self.row_ids, strict=True):
            missing = [row_id for row_id in ids if row_id not in self._old_logprobs]
            if missing:
                raise DataError(
                    f"model {self.name!r}: row {missing[0]} was not scored before the episode's "
                    "first update: call train_step on the trainer flow's batch itself, or set "
                    "runtime.algorithm.old_logprobs: rollout"
                )
            batch.extras["old_logprobs"] = batch.align(self._old_logprobs[i] for i in ids)

    def _add_advantages(self, batches: Sequence[PackedBatch]) -> None:
        advantages = [self.estimate_returns(batch).advantages for batch in batches]
        if self.algorithm.whiten_advantages:
            masks = [batch.extras["loss_mask"].bool() for batch in batches]
            moments = self.global_moments(advantages, masks)
            advantages = [whiten(a, m, moments) for a, m in zip(advantages, masks, strict=True)]
        for batch, values in zip(batches, advantages, strict=True):
            batch.extras["advantages"] = values

    def _check_first_update(self, metrics: Mapping[str, float]) -> None:
        """In debug mode: nothing has been learned yet, so the ratio must be exactly 1."""
        is_first, self._is_first_update = self._is_first_update, False
        transformer = self.settings.transformer
        has_dropout = max(transformer.hidden_dropout, transformer.attention_dropout) > 0
        if not (is_first and self.runtime_args.debug) or has_dropout:
            return
        gap, update_kl = metrics["ratio_gap"], metrics["update_kl"]
        # A mean of absolute values: it is 0 only where each of them is.
        if gap != 0.0 or not update_kl <= _FIRST_UPDATE_KL:
            raise NumericsError(
                f"model {self.name!r}: in the first update after a rollout the ratio differs from "
                f"1 by {gap:.3g} on average, and the KL to the policy that was scored before it is "
                f"{update_kl:.3g}; expected exactly 1 and at most {_FIRST_UPDATE_KL:g}: scoring "
                "and training see different numbers"
            )


def _correct_for_rollout(algorithm: AlgorithmConfig, batches: Sequence[PackedBatch]) -> None:
    """Weigh each token's policy loss, which is linear in its advantage where that is scaled."""
    if algorithm.rollout_correction == "none":
        return
    for extras in (batch.extras for batch in batches):
        extras["advantages"] = extras["advantages"] * compute_rollout_weights(
            extras["old_logprobs"],
            extras["rollout_logprobs"],
            algorithm.rollout_correction_cap,
        )
