"""ValueTrainer: the critic that learns."""

import torch

from chatlearn.algorithms.metrics import explained_variance_from_sums
from megatron_adapters.losses import build_value_loss
from megatron_adapters.modules.trainer import Columns, TrainerModule

__all__ = ["ValueTrainer"]

_COLUMNS = ("rollout_logprobs", "ref_logprobs", "values", "rewards")
_VARIANCE_SUMS = ("count", "returns", "returns_squared", "errors", "errors_squared")


class ValueTrainer(TrainerModule):
    """Fits the values of the states before each response token to the GAE returns."""

    head = "scalar"

    def train_step(self, data: list[Columns]) -> dict[str, float]:
        """One update on this rank's part of a global batch."""
        self.require_rollout(data[0], "values")
        batches = self.pack_responses(data, *_COLUMNS)
        totals = self.count_tokens(batches)
        if self.groups.is_last_stage:
            for batch in batches:
                batch.extras["old_values"] = batch.extras["values"]
                batch.extras["returns"] = self.estimate_returns(batch).returns
        metrics = self.update(batches, build_value_loss(self.algorithm, totals))
        sums = torch.tensor([metrics.pop(name) for name in _VARIANCE_SUMS], dtype=torch.float64)
        metrics["explained_variance"] = explained_variance_from_sums(sums)
        return metrics
