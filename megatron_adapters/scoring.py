"""Scores rows without gradients: log-probabilities, values, rewards."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_adapters.packing import PackedBatch
from megatron_adapters.parallel_state import ParallelGroups
from megatron_adapters.pipeline import run_forward

__all__ = ["score_rows", "score_tokens_of_rows"]


def score_tokens_of_rows(
    chunks: Sequence[Any], batches: Sequence[PackedBatch], groups: ParallelGroups
) -> list[torch.Tensor]:
    """What the head says of each response token: log-probabilities, or values before it.

    Returns:
        On the last stage one 1-D float32 tensor per row, as long as its response; else nothing.
    """

    def compute(output: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
        return batch.split(output[0])

    return [row for rows in run_forward(chunks, batches, compute, groups) for row in rows]


def score_rows(
    chunks: Sequence[Any], batches: Sequence[PackedBatch], groups: ParallelGroups
) -> list[torch.Tensor]:
    """What a scalar head says at each row's last token, packed with `reads_last`.

    Returns:
        On the last stage one float32 number per row; else nothing.
    """

    def compute(output: torch.Tensor, batch: PackedBatch) -> list[torch.Tensor]:
        return list(output[0, : batch.num_rows, 0].cpu())

    return [row for rows in run_forward(chunks, batches, compute, groups) for row in rows]
