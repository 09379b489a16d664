# pyright: standard, reportPrivateImportUsage=false
"""Attention over sequences of up to some hundred tokens on a processor, as batched matrix products.

torch's fused kernel for processors pays off for long sequences only; its gradient is slow, most of
all in bfloat16. Queries are cut to pieces, each with the keys that it can see, so that about half
of the scores are never computed.

For products of bfloat16 a program is compiled for each shape, which takes longer than small
products do; packed rows bring new shapes in every step. Small ones are float32 therefore.
"""

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["attend_short", "is_short"]

# Most keys of a sequence for which products were measured to be faster than the fused kernel.
_MOST_KEYS = {torch.float32: 512, torch.bfloat16: 1024}
_PIECE = 64
# Operations of one product over a whole batch from which on compiling a program for it pays.
_LEAST_COMPILED = 1 << 27


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
    *,
    offset: int = 0,
    scale: float | None = None,
) -> torch.Tensor:
    """`softmax(scale * queries keys^T + mask) values`, scores in float32.

    Args:
        queries: [batch, heads, queries, size], heads a multiple of the groups.
        keys: [batch, groups, keys, size].
        values: [batch, groups, keys, value size].
        mask: [batch, 1, queries, keys], added to the scores; None: causal.
        offset: query i of a sequence sees none but its first `offset + i + 1` keys.
        scale: None: 1 / sqrt(size).

    Returns:
        [batch, heads, queries, value size].
    """
    factor = queries.shape[-1] ** -0.5 if scale is None else scale
    return _ShortAttention.apply(queries, keys, values, mask, factor, offset)


@dataclass(frozen=True)
class _Piece:
    """Queries that are next to each other, and the keys that they can see.

    Attributes:
        first: the first query.
        stop: after the last.
        num_keys: which they can see, the first of the sequence.
    """

    first: int
    stop: int
    num_keys: int

    @property
    def queries(self) -> slice:
        return slice(self.first, self.stop)

    def of(self, mask: torch.Tensor) -> torch.Tensor:
        return mask[:, :, self.queries, : self.num_keys]


def _cut(num_queries: int, num_keys: int, offset: int) -> list[_Piece]:
    count = max(1, round(num_queries / _PIECE))
    cuts = [number * num_queries // count for number in range(count + 1)]
    return [
        _Piece(first, stop, min(num_keys, offset + stop))
        for first, stop in zip(cuts, cuts[1:], strict=False)
    ]


def _hide_later(piece: _Piece) -> torch.Tensor:
    """[queries, keys] float32: -inf at the keys that come after a query."""
    count = piece.stop - piece.first
    return torch.full((count, piece.num_keys), float("-inf")).triu_(1 + piece.first)


def _choose_dtype(queries: torch.Tensor, keys: torch.Tensor) -> torch.dtype:
    """Of the products but the scores'."""
    operations = 2 * queries.numel() * keys.shape[2]
    return queries.dtype if operations >= _LEAST_COMPILED else torch.float32


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        offset: int,
    ) -> torch.Tensor:
        batch, heads, num_queries, size = queries.shape
        groups, num_keys = keys.shape[1:3]
        # Heads of a group are further queries of it.
        rows = queries.reshape(batch * groups, heads // groups, num_queries, size)
        flat_keys = keys.reshape(batch * groups, num_keys, size)
        flat_values = values.reshape(batch * groups, num_keys, -1)
        dtype = _choose_dtype(queries, keys)
        wide_keys, work_values = flat_keys.float(), flat_values.to(dtype)
        pieces = _cut(num_queries, num_keys, offset)
        context = rows.new_empty((*rows.shape[:3], flat_values.shape[-1]))
        weights: list[torch.Tensor] = []
        for piece in pieces:
            some = rows[:, :, piece.queries].reshape(batch * groups, -1, size)
            scores = torch.bmm(some.float(), wide_keys[:, : piece.num_keys].transpose(1, 2))
            scores = scores.view(batch, heads, -1, piece.num_keys)
            hidden = _hide_later(piece) if mask is None else piece.of(mask)
            # In one pass: scale * scores + mask.
            torch.add(hidden, scores, alpha=scale, out=scores)
            chosen = torch.softmax(scores, dim=-1).to(queries.dtype)
            chosen = chosen.view(batch * groups, -1, piece.num_keys)
            found = torch.bmm(chosen.to(dtype), work_values[:, : piece.num_keys])
            context[:, :, piece.queries] = found.view(*rows.shape[:2], -1, values.shape[-1])
            weights.append(chosen)
        ctx.save_for_backward(rows, flat_keys, flat_values, *weights)
        ctx.scale, ctx.pieces, ctx.dtype = scale, pieces, dtype
        ctx.shapes = (queries.shape, keys.shape, values.shape)
        return context.view(batch, heads, num_queries, -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        rows, keys, values, *weights = ctx.saved_tensors
        gradient = gradients[0].reshape(*rows.shape[:3], -1).to(ctx.dtype)
        by_rows = torch.empty_like(rows)
        # Sums over pieces, in float32 as the kernel's.
        by_keys, by_values = (torch.zeros_like(t, dtype=torch.float32) for t in (keys, values))
        work_rows, work_keys, work_values = (t.to(ctx.dtype) for t in (rows, keys, values))
        for piece, kept in zip(ctx.pieces, weights, strict=True):
            at, chosen = piece.queries, kept.to(ctx.dtype)
            own = gradient[:, :, at].reshape(len(rows), -1, values.shape[-1])
            some = work_rows[:, :, at].reshape(len(rows), -1, keys.shape[-1])
            seen = slice(piece.num_keys)
            by_values[:, seen] += torch.bmm(chosen.transpose(1, 2), own)
            by_weights = torch.bmm(own, work_values[:, seen].transpose(1, 2))
            by_scores = torch._softmax_backward_data(by_weights, chosen, -1, chosen.dtype)  # noqa: SLF001
            by_scores.mul_(ctx.scale)
            by_rows[:, :, at] = torch.bmm(by_scores, work_keys[:, seen]).view_as(by_rows[:, :, at])
            by_keys[:, seen] += torch.bmm(by_scores.transpose(1, 2), some)
        parts = (by_rows, by_keys.to(keys.dtype), by_values.to(values.dtype))
        found = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return (*found, None, None, None)
