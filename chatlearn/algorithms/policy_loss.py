"""The clipped policy loss of PPO and GRPO, per token."""

from dataclasses import dataclass

import torch

__all__ = ["PolicyLoss", "compute_policy_loss"]


@dataclass(frozen=True)
class PolicyLoss:
    """Per token, [batch, seq].

    Attributes:
        loss: to be minimised.
        ratio: new over old probability, detached.
        is_clipped: where clipping changed the loss.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    is_clipped: torch.Tensor


def compute_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_ratio_low: float,
    clip_ratio_high: float,
) -> PolicyLoss:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(logprobs - old_logprobs).

    Args:
        logprobs: [batch, seq] float32, with gradient.
        old_logprobs: [batch, seq] float32 of the policy before the episode's first update.
        advantages: [batch, seq] float32.
        clip_ratio_low: the ratio counts at least as 1 - this.
        clip_ratio_high: the ratio counts at most as 1 + this.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7; separate bounds: Yu et al. 2025 (DAPO),
    arXiv:2503.14476, eq. 10.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1.0 - clip_ratio_low, 1.0 + clip_ratio_high)
    plain_loss, clipped_loss = -ratio * advantages, -clipped * advantages
    loss = torch.maximum(plain_loss, clipped_loss)
    return PolicyLoss(loss, ratio.detach(), (clipped_loss > plain_loss).detach())
