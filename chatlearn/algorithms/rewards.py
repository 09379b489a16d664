"""Token rewards from one reward per sample and the KL to the reference."""

import torch

__all__ = ["spread_rewards"]


def spread_rewards(
    rewards: torch.Tensor,
    loss_mask: torch.Tensor,
    kl: torch.Tensor | None = None,
    *,
    kl_coef: float = 0.0,
) -> torch.Tensor:
    """The sample's reward at its last trained token, less the KL penalty at every token.

    Args:
        rewards: [batch] float32.
        loss_mask: [batch, seq] bool.
        kl: [batch, seq] float32 estimate of the KL; None: no penalty.
        kl_coef: weight of the penalty.

    Returns:
        [batch, seq] float32, zero where masked; all zero in a row without trained tokens.

    Source: Ziegler et al. 2019, arXiv:1909.08593, eq. 2.
    """
    positions = torch.arange(loss_mask.shape[1], device=loss_mask.device)
    last = torch.where(loss_mask, positions, -1).max(dim=1).values
    token_rewards = torch.where(positions[None] == last[:, None], rewards[:, None], 0.0)
    if kl is not None:
        token_rewards = token_rewards - kl_coef * kl
    return torch.where(loss_mask, token_rewards, 0.0)
