# pyright: standard, reportPrivateImportUsage=false
"""Log-probability and entropy of tokens from logits that are split over the vocabulary.

The vocabulary is never gathered: three all-reduces of one number per token do it. The gradient is
exact: d logp / d l_i = [i is the token] - p_i and d H / d l_i = -p_i (log p_i + H).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_adapters.kernels.availability import can_run_kernels

__all__ = ["TokenScores", "score_tokens"]


@dataclass(frozen=True)
class TokenScores:
    """Per token, float32.

    Attributes:
        logprobs: log-probability of the target.
        entropy: of the whole distribution, nats; None where it was not asked for.
    """

    logprobs: torch.Tensor
    entropy: torch.Tensor | None


def score_tokens(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
    has_entropy: bool = True,
) -> TokenScores:
    """Score target tokens; every rank of the group gets the same result.

    Args:
        logits: [..., vocabulary / ranks] of this rank's share, any float dtype.
        targets: [...] int64.
        vocab_size: real tokens; the padding beyond them counts as impossible, so the result does
            not depend on how the vocabulary was padded.
        temperature: divides the logits; 0 counts as 1.
        group: the tensor-parallel ranks.
        has_entropy: compute the entropy, too.
    """
    first = group.rank() * logits.shape[-1]
    scale = 1.0 / (temperature or 1.0)
    kind = _ScoreTokens
    if can_run_kernels(logits):
        kind = _ScoreTokensByKernel
    scores = kind.apply(logits, targets, scale, first, vocab_size, group, has_entropy)
    return TokenScores(scores[0], scores[1] if has_entropy else None)


class _ScoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        first: int,
        vocab_size: int,
        group: dist.ProcessGroup,
        has_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        share = logits.shape[-1]
        scaled = torch.mul(logits.float(), scale)
        real = max(0, min(share, vocab_size - first))
        if real < share:
            scaled[..., real:] = -1e4
        peak = scaled.amax(-1)
        _reduce(peak, group, dist.ReduceOp.MAX)
        scaled -= peak.unsqueeze(-1)
        is_here = (targets >= first) & (targets < first + share)
        local = torch.where(is_here, targets - first, 0)
        picked = scaled.gather(-1, local.unsqueeze(-1)).squeeze(-1)
        weights = scaled.exp()
        sums = [weights.sum(-1), torch.where(is_here, picked, 0.0)]
        if has_entropy:
            sums.append(torch.mul(weights, scaled, out=weights).sum(-1))
        total = torch.stack(sums)
        _reduce(total, group, dist.ReduceOp.SUM)
        log_mass = total[0].log()
        entropy = log_mass - total[2] / total[0] if has_entropy else log_mass
        scaled -= log_mass.unsqueeze(-1)
        ctx.save_for_backward(scaled, entropy, local, is_here)
        ctx.scale, ctx.dtype = scale, logits.dtype
        return total[1] - log_mass, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        logprob_gradient, entropy_gradient = gradients
        log_probabilities, entropy, local, is_here = ctx.saved_tensors
        probabilities = log_probabilities.exp()
        # -p * (g + h * (log p + H)), with g and h the gradients of log-probability and entropy.
        if torch.count_nonzero(entropy_gradient):
            constant = logprob_gradient + entropy_gradient * entropy
            factor = log_probabilities * entropy_gradient.unsqueeze(-1)
            factor += constant.unsqueeze(-1)
            gradient = probabilities.mul_(factor).neg_()
        else:
            gradient = probabilities.mul_(logprob_gradient.neg().unsqueeze(-1))
        own = torch.where(is_here, logprob_gradient, 0.0).unsqueeze(-1)
        gradient.scatter_add_(-1, local.unsqueeze(-1), own)
        if ctx.scale != 1.0:
            gradient *= ctx.scale
        return gradient.to(ctx.dtype), None, None, None, None, None, None


class _ScoreTokensByKernel(torch.autograd.Function):
    """The same on a GPU, without a copy of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        scale: float,
        first: int,
        vocab_size: int,
        group: dist.ProcessGroup,
        has_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron_adapters.kernels.scores import sum_up_logits

        share = logits.shape[-1]
        table = logits.reshape(-1, share).contiguous()
        local = targets.reshape(-1) - first
        num_real = max(0, min(share, vocab_size - first))
        own_peak, sums = sum_up_logits(table, local, scale, num_real)
        peak = own_peak
        if group.size() > 1:
            peak = own_peak.clone()
            _reduce(peak, group, dist.ReduceOp.MAX)
            lift = own_peak - peak
            is_here = (local >= 0) & (local < share)
            sums[2] += sums[0] * lift
            sums[0::2] *= lift.exp()
            sums[1] += torch.where(is_here, lift, 0.0)
            _reduce(sums, group, dist.ReduceOp.SUM)
        mass, picked, slope = sums
        log_mass = mass.log()
        entropy = log_mass - slope / mass
        ctx.save_for_backward(table, local, log_mass + peak, entropy)
        ctx.scale, ctx.num_real, ctx.shape = scale, num_real, logits.shape
        ctx.has_entropy = has_entropy
        return (picked - log_mass).view(targets.shape), entropy.view(targets.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        from megatron_adapters.kernels.scores import write_gradient

        table, local, log_mass, entropy = ctx.saved_tensors
        given, slope = (gradient.reshape(-1) for gradient in gradients)
        found = write_gradient(
            table,
            local,
            log_mass,
            entropy if ctx.has_entropy else None,
            (given, slope),
            ctx.scale,
            ctx.num_real,
        )
        return found.view(ctx.shape), None, None, None, None, None, None


def _reduce(tensor: torch.Tensor, group: dist.ProcessGroup, operation: Any) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)
