"""Advantages: generalised advantage estimation, group advantages, whitening."""

from dataclasses import dataclass
from typing import Any, cast

import torch

__all__ = [
    "AdvantagesAndReturns",
    "MaskedMoments",
    "compute_gae",
    "compute_group_advantages",
    "compute_moments",
    "whiten",
]


@dataclass(frozen=True)
class AdvantagesAndReturns:
    """Both [batch, seq] float32, zero where masked."""

    advantages: torch.Tensor
    returns: torch.Tensor


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
) -> AdvantagesAndReturns:
    """Generalised advantage estimation over response tokens.

    Masked tokens within a response are skipped: the recursion carries over them unchanged, as if
    they were not there. The value after the last token is 0.

    Args:
        rewards: [batch, seq] float32; what lies outside `loss_mask` is ignored.
        values: [batch, seq] float32, aligned with `rewards`.
        loss_mask: [batch, seq] bool; True where the policy sampled the token.
        gamma: discount of one token.
        lam: 0: one-step differences; 1: Monte Carlo returns.

    Returns:
        Advantages (not whitened) and returns, both [batch, seq], zero where masked.

    Raises:
        ValueError: shapes differ, or `gamma` or `lam` lies outside [0, 1].

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    if not rewards.shape == values.shape == loss_mask.shape:
        raise ValueError(
            f"rewards {tuple(rewards.shape)}, values {tuple(values.shape)} and loss_mask "
            f"{tuple(loss_mask.shape)} must have one shape"
        )
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam lie in [0, 1], got {gamma} and {lam}")
    advantages = torch.zeros_like(rewards)
    next_advantage = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(next_advantage)
    for at in range(rewards.shape[1] - 1, -1, -1):
        is_trained = loss_mask[:, at]
        delta = rewards[:, at] + gamma * next_value - values[:, at]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, at] = torch.where(is_trained, advantage, 0.0)
        next_advantage = torch.where(is_trained, advantage, next_advantage)
        next_value = torch.where(is_trained, values[:, at], next_value)
    returns = torch.where(loss_mask, advantages + values, 0.0)
    return AdvantagesAndReturns(advantages, returns)


def compute_group_advantages(
    rewards: torch.Tensor, groups: torch.Tensor, *, normalization: str = "population_std"
) -> torch.Tensor:
    """Each sample's reward relative to the other samples of its prompt.

    Args:
        rewards: [batch] float32.
        groups: [batch] int64; equal for samples of one prompt.
        normalization: what the centred reward is divided by: `population_std` (plus 1e-5, as
            ChatLearn), `unbiased_std` (plus 1e-6, as verl), or nothing with `none`.
            `leave_one_out` subtracts the mean of the others and divides by nothing (RLOO,
            Ahmadian et al. 2024, arXiv:2402.14740).

    Returns:
        [batch] float32; 0 in a group of one.

    Source: Shao et al. 2024, arXiv:2402.03300, section 4.1.2.
    """
    if rewards.shape != groups.shape or rewards.dim() != 1:
        raise ValueError(
            f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)} are both [batch]"
        )
    found = cast("Any", groups).unique(return_inverse=True, return_counts=True)
    inverse, counts = cast("torch.Tensor", found[1]), cast("torch.Tensor", found[2])
    size = counts.to(rewards.dtype)[inverse]
    zeros = rewards.new_zeros(counts.shape[0])
    mean = zeros.index_add(0, inverse, rewards)[inverse] / size
    centred = rewards - mean
    if normalization == "none":
        return centred
    if normalization == "leave_one_out":
        return torch.where(size > 1, centred * size / (size - 1).clamp(min=1), 0.0)
    squares = zeros.index_add(0, inverse, centred.square())[inverse]
    if normalization == "population_std":
        return centred / ((squares / size).sqrt() + 1e-5)
    if normalization == "unbiased_std":
        return centred / ((squares / (size - 1).clamp(min=1)).sqrt() + 1e-6)
    raise ValueError(
        "normalization is population_std, unbiased_std, leave_one_out or none, got "
        f"{normalization!r}"
    )


@dataclass(frozen=True)
class MaskedMoments:
    """Count, sum and sum of squares over unmasked entries; add those of all ranks."""

    count: float
    total: float
    total_squares: float

    @property
    def mean(self) -> float:
        """Mean; 0 without entries."""
        return self.total / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """Population standard deviation."""
        if not self.count:
            return 0.0
        return max(0.0, self.total_squares / self.count - self.mean**2) ** 0.5


def compute_moments(values: torch.Tensor, loss_mask: torch.Tensor) -> MaskedMoments:
    """Moments of the unmasked entries of one part of a batch, summed in float64."""
    chosen = values[loss_mask].double()
    return MaskedMoments(float(chosen.numel()), float(chosen.sum()), float(chosen.square().sum()))


def whiten(values: torch.Tensor, loss_mask: torch.Tensor, moments: MaskedMoments) -> torch.Tensor:
    """Zero mean and unit deviation, by the moments of the whole global batch.

    Args:
        values: any shape, float32.
        loss_mask: the same shape, bool.
        moments: of the global batch, so that the result does not depend on how rows fall on
            ranks and micro-batches.

    Returns:
        Whitened values, zero where masked.
    """
    return torch.where(loss_mask, (values - moments.mean) / (moments.std + 1e-8), 0.0)
