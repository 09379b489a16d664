# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Log-probability and entropy of tokens: each logit is read once, and once for the gradient."""

import torch
import triton
import triton.language as tl

__all__ = ["sum_up_logits", "write_gradient"]

_BLOCK = 4096


def sum_up_logits(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, num_real: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is needed of each row's logits, in one pass.

    Args:
        logits: [rows, vocabulary], dense.
        targets: [rows] int64; a number outside of the vocabulary: not here.
        scale: factor of the logits.
        num_real: logits from here on count as impossible.

    Returns:
        [rows] float32, the largest scaled logit; and [3, rows] float32, with it taken off: the sum
        of the exponentials, the target's logit (0 where it is not here), and the sum of each
        exponential times its logit.
    """
    rows, columns = logits.shape
    peak = torch.empty(rows, dtype=torch.float32, device=logits.device)
    sums = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
    if rows:
        _sum_up_logits[(rows,)](
            logits, targets, peak, sums, scale, rows, columns, num_real, BLOCK=_BLOCK, num_warps=8
        )
    return peak, sums


def write_gradient(  # noqa: PLR0913
    logits: torch.Tensor,
    targets: torch.Tensor,
    log_mass: torch.Tensor,
    entropy: torch.Tensor | None,
    gradients: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    num_real: int,
) -> torch.Tensor:
    """The gradient with respect to the logits, in their dtype.

    Args:
        logits: as in `sum_up_logits`.
        targets: the same.
        log_mass: [rows] float32, logarithm of the sum of the exponentials of all scaled logits.
        entropy: [rows] float32; None: it has no gradient.
        gradients: [rows] float32 each: of the log-probability, and of the entropy.
        scale: factor of the logits.
        num_real: see `sum_up_logits`.
    """
    rows, columns = logits.shape
    out = torch.empty_like(logits)
    if rows:
        _write_gradient[(rows, triton.cdiv(columns, _BLOCK))](
            logits,
            targets,
            log_mass,
            log_mass if entropy is None else entropy,
            gradients[0].contiguous(),
            gradients[1].contiguous(),
            out,
            scale,
            columns,
            num_real,
            HAS_ENTROPY=entropy is not None,
            BLOCK=_BLOCK,
            num_warps=8,
        )
    return out


@triton.jit
def _sum_up_logits(
    logits, targets, peaks, sums, scale, rows, columns, num_real, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    source = logits + row * columns
    at = tl.arange(0, BLOCK)
    peak = tl.full([1], -1e30, tl.float32)
    mass = tl.zeros([1], tl.float32)
    slope = tl.zeros([1], tl.float32)
    for start in range(0, num_real, BLOCK):
        is_in = start + at < num_real
        values = tl.load(source + start + at, is_in, float("-inf")).to(tl.float32) * scale
        above = tl.maximum(peak, tl.max(values, 0))
        shrink = tl.exp(peak - above)
        lowered = tl.where(is_in, values - above, 0.0)
        weights = tl.where(is_in, tl.exp(lowered), 0.0)
        slope = (slope + mass * (peak - above)) * shrink + tl.sum(weights * lowered, 0)
        mass = mass * shrink + tl.sum(weights, 0)
        peak = above
    target = tl.load(targets + row)
    is_here = (target >= 0) & (target < columns)
    picked = tl.load(source + target + tl.zeros([1], tl.int64), is_here, 0.0).to(tl.float32) * scale
    picked = tl.where(target < num_real, picked, -1e4)
    only = tl.arange(0, 1)
    tl.store(peaks + row + only, peak)
    tl.store(sums + row + only, mass)
    tl.store(sums + rows + row + only, tl.where(is_here, picked - peak, 0.0))
    tl.store(sums + 2 * rows + row + only, slope)


@triton.jit
def _write_gradient(
    logits,
    targets,
    log_masses,
    entropies,
    logprob_gradients,
    entropy_gradients,
    out,
    scale,
    columns,
    num_real,
    HAS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_real = at < num_real
    values = tl.load(logits + row * columns + at, is_real, 0.0).to(tl.float32) * scale
    logprobs = values - tl.load(log_masses + row)
    given = tl.load(logprob_gradients + row)
    factor = given
    if HAS_ENTROPY:
        # -p * (g + h * (log p + H)), with g and h the gradients of log-probability and entropy.
        factor = given + tl.load(entropy_gradients + row) * (logprobs + tl.load(entropies + row))
    result = tl.where(is_real, -tl.exp(logprobs) * factor, 0.0)
    result += tl.where(at == tl.load(targets + row), given, 0.0)
    tl.store(out + row * columns + at, (result * scale).to(out.dtype.element_ty), at < columns)
