"""The clipped policy loss of PPO and GRPO, per token."""

from dataclasses import dataclass

import torch

__all__ = ["PolicyLoss", "compute_policy_loss", "compute_rollout_weights"]


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


def compute_rollout_weights(
    old_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor, cap: float
) -> torch.Tensor:
    """Truncated importance weights min(exp(old - rollout), cap), without gradient.

    A constant factor of each token's policy loss, for a sampler that computes the probabilities
    of the same weights differently.

    Args:
        old_logprobs: [batch, seq] float32 of the trainer before the episode's first update.
        rollout_logprobs: [batch, seq] float32 as the sampler reported them.
        cap: above 0.

    Source: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training", truncated importance sampling.
    """
    return (old_logprobs - rollout_logprobs).detach().exp().clamp(max=cap)
