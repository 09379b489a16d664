"""Draws tokens from logits: temperature, top-k, top-p; one uniform number per row decides."""

from dataclasses import dataclass

import torch

__all__ = ["SampledTokens", "SamplingParams", "sample_tokens"]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    Attributes:
        temperature: divides the logits; 0: the likeliest token.
        top_p: keep the likeliest tokens up to this probability mass.
        top_k: keep this many likeliest tokens; 0: all.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True)
class SampledTokens:
    """Tokens and their log-probabilities.

    Attributes:
        token_ids: [batch] int64.
        logprobs: [batch] float32, of logits / temperature before any truncation (temperature 0
            counts as 1), so that they equal what a trainer computes.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor


def sample_tokens(
    logits: torch.Tensor, params: SamplingParams, uniforms: torch.Tensor
) -> SampledTokens:
    """Sample one token per row, by the inverse of the distribution function.

    A row's result depends on its own logits and number only, not on its batch.

    Args:
        logits: [batch, vocab] float32.
        params: how to sample.
        uniforms: [batch] float64 in (0, 1).
    """
    if params.temperature == 0:
        logprobs = logits.log_softmax(-1)
        token_ids = logits.argmax(-1)
    else:
        logprobs = (logits / params.temperature).log_softmax(-1)
        token_ids = _draw(_truncate(logprobs, params), uniforms)
    chosen = logprobs.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return SampledTokens(token_ids, chosen)


def _truncate(logprobs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Log-probabilities with -inf where top-k and top-p leave tokens out."""
    if params.top_k == 0 and params.top_p >= 1.0:
        return logprobs
    ordered, order = logprobs.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if params.top_k > 0:
        keep[:, params.top_k :] = False
    if params.top_p < 1.0:
        kept = torch.where(keep, ordered, float("-inf")).softmax(-1)
        # A token stays while the mass before it is below top_p, so at least one stays.
        keep &= kept.cumsum(-1) - kept < params.top_p
    dropped = torch.zeros_like(keep).scatter(-1, order, ~keep)
    return logprobs.masked_fill(dropped, float("-inf"))


def _draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    mass = logprobs.double().exp().cumsum(-1)
    threshold = (uniforms.to(mass.device) * mass[:, -1]).unsqueeze(-1)
    return torch.searchsorted(mass, threshold, right=True).squeeze(-1).clamp(max=mass.shape[1] - 1)
