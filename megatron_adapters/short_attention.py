# pyright: standard, reportPrivateImportUsage=false
"""Attention over short sequences on a processor, as batched matrix products.

torch's fused kernel for processors is made for long sequences; its gradient in bfloat16 is slower
than in float32. Up to some hundred keys the products are faster, and their scores are few.
"""

from typing import Any

import torch

__all__ = ["attend_short", "is_short"]

# Most keys of a sequence for which products were measured to be faster than the fused kernel.
_MOST_KEYS = {torch.float32: 128, torch.bfloat16: 256}


def is_short(queries: torch.Tensor, keys: torch.Tensor) -> bool:
    """Whether `attend_short` is the faster way.

    It does not depend on whether gradients are wanted: what is scored and what is trained on has to
    agree to the bit.

    Args:
        queries: [batch, heads, queries, size].
        keys: [batch, groups, keys, size].
    """
    is_on_processor = queries.device.type == "cpu"
    return is_on_processor and keys.shape[2] <= _MOST_KEYS.get(queries.dtype, 0)


def attend_short(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """`softmax(scale * queries keys^T + mask) values`, scores in float32.

    Args:
        queries: [batch, heads, queries, size], heads a multiple of the groups.
        keys: [batch, groups, keys, size].
        values: [batch, groups, keys, value size].
        mask: [batch, 1, queries, keys], added to the scores; None: causal, as many queries as keys.
        scale: None: 1 / sqrt(size).

    Returns:
        [batch, heads, queries, value size].
    """
    if mask is None:
        count = queries.shape[2]
        mask = torch.full((count, count), float("-inf"), dtype=torch.float32).triu_(1)
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    return _ShortAttention.apply(queries, keys, values, mask, factor)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        batch, heads, num_queries, size = queries.shape
        groups, num_keys = keys.shape[1:3]
        rows = heads // groups * num_queries
        # Heads of a group are further queries of it.
        flat_queries = queries.reshape(batch * groups, rows, size)
        flat_keys = keys.reshape(batch * groups, num_keys, size)
        flat_values = values.reshape(batch * groups, num_keys, -1)
        scores = torch.bmm(flat_queries.float(), flat_keys.float().transpose(1, 2))
        scores = scores.view(batch, heads, num_queries, num_keys)
        # In one pass: scale * scores + mask.
        torch.add(mask, scores, alpha=scale, out=scores)
        weights = torch.softmax(scores, dim=-1).to(queries.dtype)
        weights = weights.view(batch * groups, rows, num_keys)
        ctx.save_for_backward(flat_queries, flat_keys, flat_values, weights)
        ctx.scale = scale
        ctx.shapes = (queries.shape, keys.shape, values.shape)
        return torch.bmm(weights, flat_values).view(batch, heads, num_queries, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        queries, keys, values, weights = ctx.saved_tensors
        gradient = gradients[0].reshape(len(queries), queries.shape[1], -1)
        by_values = torch.bmm(weights.transpose(1, 2), gradient)
        by_weights = torch.bmm(gradient, values.transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)  # noqa: SLF001
        by_scores.mul_(ctx.scale)
        by_queries = torch.bmm(by_scores, keys)
        by_keys = torch.bmm(by_scores.transpose(1, 2), queries)
        parts = (by_queries, by_keys, by_values)
        found = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return (*found, None, None)
