# pyright: standard, reportPrivateImportUsage=false
"""Elementwise parts of a layer with as few passes over memory as eager torch allows.

Each saves what its gradient needs and nothing else, and writes where its result belongs: autograd
over the plain formulas would keep and copy every intermediate tensor. On a GPU each is one kernel,
torch's own or, where Triton is there, one of `megatron_adapters/kernels/`.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_adapters.kernels.availability import can_run_kernels

__all__ = ["SwiGLU", "gelu_tanh", "rms_norm", "rotate", "swiglu"]


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: float = 0.0
) -> torch.Tensor:
    """Hidden / rms(hidden) * (weight + offset) over the last axis.

    The root mean square is taken in float32 where the input has fewer bits.

    Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4.
    """
    if hidden.is_cuda and not offset and hidden.dtype == weight.dtype:
        return functional.rms_norm(hidden, hidden.shape[-1:], weight, eps)
    if not torch.is_grad_enabled():
        return _normalize(hidden, weight.float() + offset if offset else weight, eps)[0]
    return _RMSNorm.apply(hidden, weight, eps, offset)


def _normalize(
    hidden: torch.Tensor, gain: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and what each row was multiplied by, float32."""
    is_wide = hidden.dtype == torch.float32
    wide = hidden if is_wide else hidden.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    floor = torch.full((), eps, device=wide.device)
    scale = torch.addcmul(floor, scale, scale, value=1.0 / hidden.shape[-1]).rsqrt_()
    normalized = torch.mul(wide, scale) if is_wide else wide.mul_(scale)
    return normalized.mul_(gain).to(hidden.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, eps: float, offset: float
    ) -> torch.Tensor:
        gain = weight.float() + offset if offset else weight
        normalized, scale = _normalize(hidden, gain, eps)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(hidden, gain, scale)
        return normalized

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        hidden, gain, scale = ctx.saved_tensors
        size = hidden.shape[-1]
        normalized = torch.mul(hidden, scale)
        gradient = gradient.float()
        # d x = scale * (g * w - n * mean(g * w * n)), with n the normalised input.
        slope = torch.mul(gradient, gain)
        share = (slope * normalized).sum(-1, keepdim=True).mul_(-1.0 / size)
        slope.addcmul_(normalized, share).mul_(scale)
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (
                normalized.mul_(gradient).reshape(-1, size).sum(0).to(ctx.weight_dtype)
            )
        return slope.to(hidden.dtype), weight_gradient, None, None


def gelu_tanh(hidden: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula.

    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2.
    """
    return functional.gelu(hidden, approximate="tanh")


def swiglu(gate_and_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where the last axis holds the gate's half and then the up half.

    Source: Shazeer 2020, arXiv:2002.05202, eq. 6.
    """
    return _SwiGLU.apply(gate_and_up)


class SwiGLU(nn.Module):
    """`swiglu` as the module that Megatron's MLP builds."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        del config

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """See `swiglu`."""
        return swiglu(gate_and_up)

    def sharded_state_dict(self, *_arguments: Any, **_options: Any) -> dict[str, Any]:
        """It has no weights; Megatron asks every part of an MLP."""
        return {}


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        if can_run_kernels(gate_and_up):
            from megatron_adapters.kernels.elementwise import gate as gate_by_kernel

            return gate_by_kernel(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (gradient,) = gradients
        (gate_and_up,) = ctx.saved_tensors
        if can_run_kernels(gate_and_up):
            from megatron_adapters.kernels.elementwise import gate_backward

            return gate_backward(gate_and_up, gradient)
        gate, up = gate_and_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_and_up)
        gate_gradient, up_gradient = result.chunk(2, dim=-1)
        torch.mul(functional.silu(gate), gradient, out=up_gradient)
        slope = torch.mul(gradient, up)
        torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=gate_gradient)
        return result


def rotate(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, is_interleaved: bool
) -> torch.Tensor:
    """Rotary positions: turn pairs of a head's elements by their token's angles.

    Args:
        heads: [tokens, batch, heads, size].
        cos: [tokens, 1, 1, angles] float32, one for each pair; elements beyond the pairs stay.
        sin: the same.
        is_interleaved: pairs are neighbours, else an element of each half.

    Returns:
        As `heads`, contiguous.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """
    return _Rotate.apply(heads, cos, sin, is_interleaved)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_interleaved: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.is_interleaved = is_interleaved
        return _turn(heads, cos, sin, 1.0, is_interleaved=is_interleaved)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        cos, sin = ctx.saved_tensors
        turned = _turn(gradient, cos, sin, -1.0, is_interleaved=ctx.is_interleaved)
        return turned, None, None, None


def _turn(
    heads: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sign: float,
    *,
    is_interleaved: bool,
) -> torch.Tensor:
    if can_run_kernels(heads) and not is_interleaved:
        from megatron_adapters.kernels.elementwise import turn

        return turn(heads, cos, sin, sign)
    angles = cos.shape[-1]
    turned = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    turned[..., 2 * angles :] = heads[..., 2 * angles :]
    one, two = _pairs(heads, angles, is_interleaved=is_interleaved)
    out_one, out_two = _pairs(turned, angles, is_interleaved=is_interleaved)
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    torch.mul(one, cos, out=out_one).addcmul_(two, sin, value=-sign)
    torch.mul(two, cos, out=out_two).addcmul_(one, sin, value=sign)
    return turned


def _pairs(
    heads: torch.Tensor, angles: int, *, is_interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    if is_interleaved:
        return heads[..., 0 : 2 * angles : 2], heads[..., 1 : 2 * angles : 2]
    return heads[..., :angles], heads[..., angles : 2 * angles]
