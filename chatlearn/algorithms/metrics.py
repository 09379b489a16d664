"""Metrics as sums that may be added over micro-batches and ranks."""

import torch

__all__ = ["explained_variance_sums", "explained_variance_from_sums", "token_logprobs"]


def explained_variance_sums(
    values: torch.Tensor, returns: torch.Tensor, loss_mask: torch.Tensor
) -> torch.Tensor:
    """Sums for the explained variance: count, returns, returns^2, errors, errors^2.

    Args:
        values: [batch, seq] predictions.
        returns: [batch, seq].
        loss_mask: [batch, seq] bool.

    Returns:
        [5] float64.
    """
    target = returns[loss_mask].double()
    error = target - values[loss_mask].double()
    count = torch.tensor(float(target.numel()), dtype=torch.float64, device=target.device)
    sums = (target.sum(), target.square().sum(), error.sum(), error.square().sum())
    return torch.stack([count, *sums])


def explained_variance_from_sums(sums: torch.Tensor) -> float:
    """1 - Var[returns - values] / Var[returns]; 0 where the returns do not vary."""
    count, total, squares, error, error_squares = map(float, sums)
    if count < 2:
        return 0.0
    variance = squares / count - (total / count) ** 2
    error_variance = error_squares / count - (error / count) ** 2
    return 1.0 - error_variance / variance if variance > 1e-12 else 0.0


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Log-probability of given tokens, for plain torch modules.

    Args:
        logits: [..., vocab], any float dtype.
        token_ids: [...] int64.
        temperature: divides the logits; 0 counts as 1.

    Returns:
        [...] float32.
    """
    scaled = logits.float() / (temperature or 1.0)
    return scaled.log_softmax(-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
