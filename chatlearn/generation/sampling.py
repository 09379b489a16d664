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
        token_ids = logits.argmax(-1)
        probabilities = logits.softmax(-1)
    else:
        scaled = logits if params.temperature == 1.0 else logits / params.temperature
        probabilities = scaled.softmax(-1)
        token_ids = _draw(_truncate(probabilities, params), uniforms)
    chosen = probabilities.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)
    return SampledTokens(token_ids, chosen.log())


def _truncate(probabilities: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Probabilities with 0 where top-k and top-p leave tokens out; not scaled to 1 again."""
    if params.top_k == 0 and params.top_p >= 1.0:
        return probabilities
    ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
    if params.top_k > 0:
        ordered[:, params.top_k :] = 0.0
    if params.top_p < 1.0:
        mass = ordered.double().cumsum(-1)
        # A token stays while the mass before it is below top_p, so at least one stays.
        is_out = mass - ordered >= params.top_p * mass[:, -1:]
        ordered.masked_fill_(is_out, 0.0)
    return torch.zeros_like(ordered).scatter(-1, order, ordered)


def _draw(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The first token at which the cumulated probability exceeds the number's share of the whole.

    In float32 a token's share of the numbers is off by some 1e-7. The threshold stays below the
    whole, so a token of probability 0 is never drawn.
    """
    mass = probabilities.cumsum(-1)
    whole = mass[:, -1]
    share = uniforms.to(whole.device, torch.float32) * whole
    threshold = torch.minimum(share, torch.nextafter(whole, torch.zeros_like(whole)))
    return torch.searchsorted(mass, threshold.unsqueeze(-1), right=True).squeeze(-1)
