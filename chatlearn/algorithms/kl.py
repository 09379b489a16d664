"""Estimates of the KL divergence from samples of the first distribution."""

import torch

__all__ = ["estimate_kl"]


def estimate_kl(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Per-token estimate of KL(policy, reference); nothing is clamped.

    With d = logprobs - ref_logprobs: k1 = d (unbiased, may be negative), k2 = d^2 / 2 (biased, low
    variance), k3 = exp(-d) - 1 + d (unbiased, never negative).

    Args:
        logprobs: of tokens that the policy sampled, any shape.
        ref_logprobs: the reference's, the same shape.
        estimator: k1, k2 or k3.

    Source: Schulman 2020, "Approximating KL Divergence".
    """
    difference = logprobs - ref_logprobs
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return 0.5 * difference.square()
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"estimator is k1, k2 or k3, got {estimator!r}")
