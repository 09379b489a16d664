"""Sample managers of the built-in engines: what becomes of an episode's samples before training.

They run on the driver, over plain row dicts, once the whole episode is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.data.relay import RelaySampleManager
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.config import RuntimeConfig
    from chatlearn.data.relay import EpisodeRelayBuffer

__all__ = ["GroupAdvantageManager", "PreferencePairManager"]

_PAIR_COLUMNS = ("rewards", "prompt_token_ids", "response_token_ids", "ref_logprobs")


class GroupAdvantageManager(RelaySampleManager):
    """Adds `advantages`: each sample's reward relative to the other samples of its prompt.

    Args:
        normalization: what the centred reward is divided by; see
            `chatlearn.algorithms.advantages.compute_group_advantages`. None: as
            `runtime.algorithm.advantage_normalization` says.
    """

    uses_past_episodes = False

    def __init__(self, normalization: str | None = None) -> None:
        super().__init__()
        self.normalization = normalization

    def attach(self, runtime: RuntimeConfig) -> None:
        """Take the normalization from the config, unless it was given."""
        if self.normalization is None:
            self.normalization = runtime.algorithm.advantage_normalization

    def __call__(self, episodes: Sequence[EpisodeRelayBuffer]) -> list[dict[str, Any]]:
        """Rows of the newest episode with their advantages (scalar float32 tensors)."""
        import torch

        from chatlearn.algorithms.advantages import compute_group_advantages

        rows = episodes[-1].buffer
        _check_columns(rows, ("rewards",), "group advantages")
        rewards = torch.tensor([float(row["rewards"]) for row in rows])
        groups = torch.tensor([row["row_id"].prompt for row in rows])
        normalization = self.normalization or "population_std"
        advantages = compute_group_advantages(rewards, groups, normalization=normalization)
        return [{**row, "advantages": value} for row, value in zip(rows, advantages, strict=True)]


class PreferencePairManager(RelaySampleManager):
    """Makes one preference pair of each prompt's samples: highest against lowest reward.

    Prompts whose samples all have the same reward teach nothing and are left out; the share
    that is kept is reported as a metric. An episode of such prompts alone is not trained on.
    """

    uses_past_episodes = False

    def __call__(self, episodes: Sequence[EpisodeRelayBuffer]) -> list[dict[str, Any]]:
        """One row per prompt with `chosen_*` and `rejected_*` columns."""
        groups: dict[int, list[dict[str, Any]]] = {}
        _check_columns(episodes[-1].buffer, _PAIR_COLUMNS, "preference pairs")
        for row in episodes[-1].buffer:
            groups.setdefault(row["row_id"].prompt, []).append(row)
        pairs: list[dict[str, Any]] = []
        for samples in groups.values():
            ranked = sorted(samples, key=lambda row: float(row["rewards"]))
            if float(ranked[0]["rewards"]) < float(ranked[-1]["rewards"]):
                pairs.append(_build_pair(chosen=ranked[-1], rejected=ranked[0]))
        self.log_metrics({"kept_pairs": len(pairs) / len(groups)})
        return pairs


def _check_columns(rows: Sequence[dict[str, Any]], needed: Sequence[str], what: str) -> None:
    for row in rows:
        for key in needed:
            if key not in row:
                raise DataError(
                    f"{what} need the column `{key}`; the environment flow gave "
                    f"{', '.join(map(str, row))}"
                )


def _build_pair(chosen: dict[str, Any], rejected: dict[str, Any]) -> dict[str, Any]:
    return {
        "row_id": chosen["row_id"],
        "prompt_token_ids": chosen["prompt_token_ids"],
        "chosen_token_ids": chosen["response_token_ids"],
        "rejected_token_ids": rejected["response_token_ids"],
        "chosen_ref_logprobs": chosen["ref_logprobs"].sum(),
        "rejected_ref_logprobs": rejected["ref_logprobs"].sum(),
        "rewards": chosen["rewards"],
    }
