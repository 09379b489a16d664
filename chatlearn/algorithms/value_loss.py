"""The clipped value loss, per token."""

import torch

__all__ = ["compute_value_loss"]


def compute_value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    value_clip: float | None,
) -> torch.Tensor:
    """Half the squared error, the larger of plain and clipped prediction.

    Args:
        values: [batch, seq] float32, with gradient.
        old_values: [batch, seq] float32 of the rollout.
        returns: [batch, seq] float32.
        value_clip: the prediction moves at most this far from `old_values`; None: no clipping.

    Returns:
        [batch, seq] loss.

    Source: Schulman et al. 2017, as in OpenAI Baselines' PPO2.
    """
    plain = (values - returns).square()
    if value_clip is None:
        return 0.5 * plain
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum(plain, (near - returns).square())
