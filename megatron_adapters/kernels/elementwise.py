# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""Gated activation and rotary positions: each one pass over memory."""

import torch
import triton
import triton.language as tl

__all__ = ["gate", "gate_backward", "turn"]

_BLOCK = 1024


def gate(wide: torch.Tensor) -> torch.Tensor:
    """`silu(first half) * second half` of the last axis.

    Args:
        wide: [..., 2 * columns], dense.

    Returns:
        [..., columns].
    """
    columns = wide.shape[-1] // 2
    out = wide.new_empty((*wide.shape[:-1], columns))
    if out.numel():
        grid = (out.numel() // columns, triton.cdiv(columns, _BLOCK))
        _gate[grid](wide.contiguous(), out, columns, BLOCK=_BLOCK)
    return out


def gate_backward(wide: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """The gradient of `gate`.

    Args:
        wide: what `gate` got.
        gradient: [..., columns], of its result.

    Returns:
        [..., 2 * columns].
    """
    columns = gradient.shape[-1]
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    if out.numel():
        grid = (gradient.numel() // columns, triton.cdiv(columns, _BLOCK))
        _gate_backward[grid](wide.contiguous(), gradient.contiguous(), out, columns, BLOCK=_BLOCK)
    return out


def turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float) -> torch.Tensor:
    """Rotary positions of halves, see `megatron_adapters.fused.rotate`.

    Args:
        heads: [tokens, batch, heads, size]; elements of a head lie side by side.
        cos: [tokens, 1, 1, angles].
        sin: the same.
        sign: of the angles: 1, or -1 for the gradient.

    Returns:
        As `heads`, dense.
    """
    tokens, batch, count, size = heads.shape
    if heads.stride(-1) != 1:
        heads = heads.contiguous()
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    angles = cos.shape[-1]
    if out.numel():
        _turn[(tokens * batch,)](
            heads,
            out,
            cos.contiguous(),
            sin.contiguous(),
            sign,
            batch,
            count,
            size,
            angles,
            *heads.stride()[:3],
            HEADS=triton.next_power_of_2(count),
            ANGLES=triton.next_power_of_2(angles),
            REST=triton.next_power_of_2(size - 2 * angles) if size > 2 * angles else 0,
        )
    return out


@triton.jit
def _gate(wide, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < columns
    opened = tl.load(wide + row * 2 * columns + at, is_in, 0.0).to(tl.float32)
    up = tl.load(wide + row * 2 * columns + columns + at, is_in, 0.0).to(tl.float32)
    result = opened * tl.sigmoid(opened) * up
    tl.store(out + row * columns + at, result.to(out.dtype.element_ty), is_in)


@triton.jit
def _gate_backward(wide, gradient, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_in = at < columns
    first = row * 2 * columns + at
    opened = tl.load(wide + first, is_in, 0.0).to(tl.float32)
    up = tl.load(wide + first + columns, is_in, 0.0).to(tl.float32)
    slope = tl.load(gradient + row * columns + at, is_in, 0.0).to(tl.float32)
    share = tl.sigmoid(opened)
    inner = slope * up * share * (1.0 + opened * (1.0 - share))
    kind = out.dtype.element_ty
    tl.store(out + first, inner.to(kind), is_in)
    tl.store(out + first + columns, (slope * opened * share).to(kind), is_in)


@triton.jit
def _turn(
    heads,
    out,
    cos,
    sin,
    sign,
    batch,
    count,
    size,
    angles,
    token_stride,
    batch_stride,
    head_stride,
    HEADS: tl.constexpr,
    ANGLES: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = row // batch
    kind = out.dtype.element_ty
    source = heads + token * token_stride + (row % batch) * batch_stride
    target = out + row * count * size
    head = tl.arange(0, HEADS)[:, None]
    at = tl.arange(0, ANGLES)[None, :]
    is_in = (head < count) & (at < angles)
    # Angles are rounded as the heads are, like everywhere.
    angle_cos = tl.load(cos + token * angles + at, at < angles, 0.0).to(kind).to(tl.float32)
    angle_sin = tl.load(sin + token * angles + at, at < angles, 0.0).to(kind).to(tl.float32) * sign
    one = tl.load(source + head * head_stride + at, is_in, 0.0).to(tl.float32)
    two = tl.load(source + head * head_stride + angles + at, is_in, 0.0).to(tl.float32)
    tl.store(target + head * size + at, (one * angle_cos - two * angle_sin).to(kind), is_in)
    tl.store(
        target + head * size + angles + at, (two * angle_cos + one * angle_sin).to(kind), is_in
    )
    if REST > 0:
        rest = 2 * angles + tl.arange(0, REST)[None, :]
        is_rest = (head < count) & (rest < size)
        kept = tl.load(source + head * head_stride + rest, is_rest, 0.0)
        tl.store(target + head * size + rest, kept, is_rest)
