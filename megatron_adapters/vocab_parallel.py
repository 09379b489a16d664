# pyright: standard, reportPrivateImportUsage=false
"""Log-probability and entropy of tokens from logits that are split over the vocabulary.

The vocabulary is never gathered: three all-reduces of one number per token do it. The gradient is
exact: d logp / d l_i = [i is the token] - p_i and d H / d l_i = -p_i (log p_i + H).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["TokenScores", "score_tokens"]


@dataclass(frozen=True)
class TokenScores:
    """Per token, float32.

    Attributes:
        logprobs: log-probability of the target.
        entropy: of the whole distribution, nats.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor


def score_tokens(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
) -> TokenScores:
    """Score target tokens; every rank of the group gets the same result.

    Args:
        logits: [..., vocabulary / ranks] of this rank's share, any float dtype.
        targets: [...] int64.
        vocab_size: real tokens; the padding beyond them counts as impossible, so the result does
            not depend on how the vocabulary was padded.
        temperature: divides the logits; 0 counts as 1.
        group: the tensor-parallel ranks.
    """
    scaled = logits.float() / (temperature or 1.0)
    first = group.rank() * logits.shape[-1]
    logprobs, entropy = _ScoreTokens.apply(scaled, targets, first, vocab_size, group)
    return TokenScores(logprobs, entropy)


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        first: int,
        vocab_size: int,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        share = logits.shape[-1]
        real = max(0, min(share, vocab_size - first))
        if real < share:
            logits = logits.clone()
            logits[..., real:] = torch.finfo(logits.dtype).min
        peak = logits.amax(-1)
        _reduce(peak, group, dist.ReduceOp.MAX)
        logits = logits - peak.unsqueeze(-1)
        probabilities = logits.exp()
        is_here = (targets >= first) & (targets < first + share)
        local = torch.where(is_here, targets - first, 0)
        picked = logits.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        sums = torch.stack(
            [
                probabilities.sum(-1),
                torch.where(is_here, picked, 0.0),
                (probabilities * logits.clamp(min=-1e4)).sum(-1),
            ]
        )
        _reduce(sums, group, dist.ReduceOp.SUM)
        mass, target_logit, weighted = sums
        log_mass = mass.log()
        probabilities /= mass.unsqueeze(-1)
        entropy = log_mass - weighted / mass
        ctx.save_for_backward(probabilities, logits, log_mass, entropy, local, is_here)
        return target_logit - log_mass, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        logprob_gradient, entropy_gradient = gradients
        probabilities, logits, log_mass, entropy, local, is_here = ctx.saved_tensors
        gradient = -probabilities * logprob_gradient.unsqueeze(-1)
        own = torch.where(is_here, logprob_gradient, 0.0).unsqueeze(-1)
        gradient.scatter_add_(-1, local.unsqueeze(-1), own)
        if torch.count_nonzero(entropy_gradient):
            log_probabilities = (logits - log_mass.unsqueeze(-1)).clamp(min=-1e4)
            slope = -probabilities * (log_probabilities + entropy.unsqueeze(-1))
            gradient += slope * entropy_gradient.unsqueeze(-1)
        return gradient, None, None, None, None


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup, operation: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)
