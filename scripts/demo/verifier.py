"""The demo's rewards: a rule that needs no model, and a reward model kept between 0 and 1."""

from __future__ import annotations

from typing import Any

import torch

from chatlearn import BaseModule
from megatron_adapters import RewardInference

__all__ = ["BoundedReward", "Brevity", "RuleVerifier"]


class RuleVerifier(BaseModule):
    """Compares each response with the row's answer, character by character.

    With the option `metric_only` it leaves `rewards` to another model and only reports
    `exact_match`.
    """

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Adds `exact_match` and, unless it is a metric only, `rewards`: 1.0 or 0.0."""
        matches = [
            float(response == answer)
            for response, answer in zip(data["response"], data["answer"], strict=True)
        ]
        exact_match = torch.tensor(matches)
        self.log_metrics({"exact_match": sum(matches) / max(len(matches), 1)})
        if self.model_args.get("metric_only"):
            return {**data, "exact_match": exact_match}
        return {**data, "exact_match": exact_match, "rewards": exact_match}

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """The same as `forward_step`."""
        return self.forward_step(data)


class Brevity(BaseModule):
    """The shorter a response, the better: the reward of `configs/first_flow.yaml`."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Adds `rewards`: minus the response's tokens."""
        return {**data, "rewards": [-float(len(ids)) for ids in data["response_token_ids"]]}


class BoundedReward(RewardInference):
    """The reward model's number through a sigmoid, so that it compares with exact match."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Adds `rewards` in (0, 1), also as `reward_score` to tell them from the rule's."""
        scored = super().forward_step(data)
        bounded = scored["rewards"].sigmoid()
        return {**scored, "rewards": bounded, "reward_score": bounded}
