"""The one place where per-token losses become one number.

The loss of a global batch is the sum over its tokens of loss times weight, and the weights depend
on totals of the *global* batch only. So the result is the same however the rows fall on
micro-batches and ranks.
"""

from dataclasses import dataclass

import torch

__all__ = ["BatchTotals", "compute_token_weights"]


@dataclass(frozen=True)
class BatchTotals:
    """Counts of a whole global batch, all ranks together.

    Attributes:
        num_tokens: trained tokens.
        num_sequences: rows with at least one trained token.
    """

    num_tokens: float
    num_sequences: float


def compute_token_weights(
    loss_mask: torch.Tensor, aggregation: str, totals: BatchTotals
) -> torch.Tensor:
    """Weight of every token's loss in the global batch's loss.

    Args:
        loss_mask: [batch, seq] bool of one micro-batch.
        aggregation: `token_mean`: the mean over all trained tokens; `sequence_mean`: the mean over
            each row's tokens, then over rows; `sequence_sum`: the sum over each row's tokens,
            then the mean over rows.
        totals: of the global batch.

    Returns:
        [batch, seq] float32, zero where masked.
    """
    mask = loss_mask.to(torch.float32)
    if aggregation == "token_mean":
        return mask / max(totals.num_tokens, 1.0)
    if aggregation == "sequence_sum":
        return mask / max(totals.num_sequences, 1.0)
    if aggregation == "sequence_mean":
        lengths = mask.sum(dim=1, keepdim=True).clamp(min=1.0)
        return mask / lengths / max(totals.num_sequences, 1.0)
    raise ValueError(
        f"aggregation is token_mean, sequence_mean or sequence_sum, got {aggregation!r}"
    )
