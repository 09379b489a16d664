"""Scores rows without gradients: log-probabilities, values, rewards."""

from collections.abc import Sequence
from typing import Any

import torch

from megatron_adapters.batches import PaddedBatch
from megatron_adapters.parallel_state import ParallelGroups
from megatron_adapters.pipeline import run_forward
from megatron_adapters.vocab_parallel import score_tokens

__all__ = ["score_logprobs", "score_rewards", "score_values"]


def score_logprobs(
    chunks: Sequence[Any],
    batches: Sequence[PaddedBatch],
    groups: ParallelGroups,
    *,
    vocab_size: int,
    temperature: float,
) -> list[torch.Tensor]:
    """Log-probabilities of the response tokens.

    Returns:
        On the last stage [rows, length] float32 per micro-batch, at predicting positions.
    """

    def compute(logits: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        scores = score_tokens(
            logits,
            batch.targets,
            vocab_size=vocab_size,
            temperature=temperature,
            group=groups.tensor,
        )
        return torch.where(batch.mask, scores.logprobs, 0.0)

    return run_forward(chunks, batches, compute, groups)


def score_values(
    chunks: Sequence[Any], batches: Sequence[PaddedBatch], groups: ParallelGroups
) -> list[torch.Tensor]:
    """Values of the states before each response token: [rows, length] on the last stage."""

    def compute(output: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        return torch.where(batch.mask, output.squeeze(-1).float(), 0.0)

    return run_forward(chunks, batches, compute, groups)


def score_rewards(
    chunks: Sequence[Any], batches: Sequence[PaddedBatch], groups: ParallelGroups
) -> list[torch.Tensor]:
    """One number per row, read at its last token: [rows] on the last stage."""

    def compute(output: torch.Tensor, batch: PaddedBatch) -> torch.Tensor:
        return batch.last_token_values(output.squeeze(-1).float())

    return run_forward(chunks, batches, compute, groups)
