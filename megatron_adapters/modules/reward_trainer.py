"""RewardTrainer: a reward model that learns from preference pairs."""

from megatron_adapters.losses import build_pairwise_loss
from megatron_adapters.modules.trainer import Columns, TrainerModule

__all__ = ["RewardTrainer"]


class RewardTrainer(TrainerModule):
    """Gives the chosen response of a pair a higher number than the rejected one."""

    head = "scalar"
    reads_last = True

    def train_step(self, data: list[Columns]) -> dict[str, float]:
        """One update on this rank's part of a global batch of pairs."""
        batches = self.pack_pairs(data)
        num_pairs = self.count_rows(data)
        return {**self.update(batches, build_pairwise_loss(num_pairs)), "num_pairs": num_pairs}
