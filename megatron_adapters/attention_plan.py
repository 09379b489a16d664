"""Which tokens of a packed stream attend to which, as few batched kernel calls. Pure.

A stream holds rows one after another without padding. A row is one segment, or, where several rows
share a prompt, the prompt is a segment of its own and each response is a segment that follows it:
its tokens see the whole prompt and their own past, and the prompt's gradient is the sum over the
responses by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

__all__ = ["AttentionBlock", "AttentionPlan", "Segment", "plan_attention", "split_stream"]

# Sequences share a kernel call while the shorter are at least this share of the longest.
_LEAST_FILL = 0.8
# Masked queries are cut to pieces of this length, so that a mask stays small and few of its
# elements are False.
_MOST_MASKED_QUERIES = 512
_MOST_MASK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens of the stream.

    Attributes:
        start: where they begin in the stream.
        length: how many there are.
        prefix: the segment that they continue; None: they begin a row.
    """

    start: int
    length: int
    prefix: "Segment | None" = None

    @property
    def first_position(self) -> int:
        """Position of the first token within its row."""
        return self.prefix.length if self.prefix is not None else 0

    @property
    def stop(self) -> int:
        """Position after the last token within its row."""
        return self.first_position + self.length


@dataclass(frozen=True)
class AttentionBlock:
    """Sequences that one kernel call attends for.

    Attributes:
        batch: sequences.
        num_queries: queries of each, padded to the longest.
        num_keys: keys of each, padded to the longest.
        first: where the queries and keys lie one after another, unpadded, in the stream; None: the
            plan's `queries` and `keys` say where.
        mask: [batch, 1, num_queries, num_keys], 0 where a query may look and -inf elsewhere; None:
            causal.
        window_mask: the same for layers with a sliding window; None where no layer has one.
        offset: query i sees none but the first `offset + i + 1` keys.
    """

    batch: int
    num_queries: int
    num_keys: int
    first: int | None = None
    mask: torch.Tensor | None = None
    window_mask: torch.Tensor | None = None
    offset: int = 0


@dataclass(frozen=True)
class AttentionPlan:
    """How one packed stream attends; handed to every layer as Megatron's `packed_seq_params`.

    Attributes:
        blocks: the kernel calls.
        queries: [queries of all blocks] int64, one block after another, indices into this rank's
            tokens; None: each block lies in the stream as it is.
        keys: [keys of all blocks] int64, indices into the tokens of all context-parallel ranks.
        restore: [tokens] int64, where each of this rank's tokens lies in the blocks' outputs one
            after another; None: they are in order.
        cos: [tokens, 1, 1, angles] of this rank's positions; None without rotary positions.
        sin: the same.
        local_cos: as `cos`, in layers with a sliding window; None: the same there.
        local_sin: the same.
        qkv_format: read by Megatron; not one of its own formats.
        cp_group: read by Megatron.
    """

    blocks: tuple[AttentionBlock, ...]
    queries: torch.Tensor | None
    keys: torch.Tensor | None
    restore: torch.Tensor | None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    local_cos: torch.Tensor | None = None
    local_sin: torch.Tensor | None = None
    qkv_format: str = "blocks"
    cp_group: None = None


@dataclass(frozen=True)
class _Piece:
    """Queries of one segment, [low, high) within it, from `start` on this rank."""

    segment: Segment
    low: int
    high: int
    start: int

    @property
    def num_queries(self) -> int:
        return self.high - self.low

    @property
    def num_keys(self) -> int:
        return self.segment.first_position + self.high


def plan_attention(
    segments: Sequence[Segment],
    num_tokens: int,
    *,
    parts: Sequence[torch.Tensor] = (),
    rank: int = 0,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> AttentionPlan:
    """Plan the kernel calls for a stream.

    Args:
        segments: in the stream's order.
        num_tokens: length of the stream; tokens of no segment fill up and attend to nothing.
        parts: of the stream, one for each context-parallel rank, from `split_stream`; none: there
            is one rank.
        rank: which part is this rank's.
        window: tokens before its own that a query of a windowed layer sees; None: no such layer.
        dtype: of the masks, the one of the queries.
        device: where the tensors go.
    """
    local = parts[rank] if len(parts) > 1 else None
    pieces = _cut(segments, local)
    causal = [p for p in pieces if p.segment.prefix is None and p.low == 0 and window is None]
    chosen = {id(piece) for piece in causal}
    masked = [part for p in pieces if id(p) not in chosen for part in _split(p)]
    groups = [*_bucket(causal, is_masked=False), *_bucket(masked, is_masked=True)]
    # The keys of several ranks are gathered in the order of the ranks.
    places = None if local is None else torch.argsort(torch.cat(list(parts)))
    # All or none: the gradient of one gather is one pass, that of many views is many.
    can_view = window is None and places is None and all(map(_is_contiguous, groups))
    indices = [] if can_view else [_gather(group, places) for group in groups]
    queries = torch.cat([some.queries for some in indices]).to(device) if indices else None
    keys = torch.cat([some.keys for some in indices]).to(device) if indices else None
    blocks = [_build_block(group, window, dtype, device, can_view=can_view) for group in groups]
    restore = _restore(groups, num_tokens if local is None else len(local))
    return AttentionPlan(
        tuple(blocks), queries, keys, None if restore is None else restore.to(device)
    )


def split_stream(num_tokens: int, num_ranks: int) -> list[torch.Tensor]:
    """Cut a stream to context-parallel ranks: two chunks each, from the front and from the back.

    Under a causal mask that gives every rank the same work for a stream of one row.

    Args:
        num_tokens: a multiple of twice the number of ranks.
        num_ranks: context-parallel ranks.

    Returns:
        For each rank [num_tokens / num_ranks] int64, ascending.
    """
    chunks = torch.arange(num_tokens).chunk(2 * num_ranks)
    return [torch.cat([chunks[r], chunks[2 * num_ranks - 1 - r]]) for r in range(num_ranks)]


def _cut(segments: Sequence[Segment], local: torch.Tensor | None) -> list[_Piece]:
    """The parts of each segment whose queries this rank has."""
    if local is None:
        return [_Piece(s, 0, s.length, s.start) for s in segments if s.length]
    pieces: list[_Piece] = []
    before = 0
    for run in _runs(cast("list[int]", cast("Any", local).tolist())):
        for segment in segments:
            low = max(segment.start, run.start)
            high = min(segment.start + segment.length, run.start + run.length)
            if low < high:
                own = (low - segment.start, high - segment.start)
                pieces.append(_Piece(segment, *own, before + low - run.start))
        before += run.length
    return pieces


def _runs(local: Sequence[int]) -> list[Segment]:
    """Consecutive runs of the stream, in the order in which this rank has them."""
    runs: list[Segment] = []
    first = 0
    for at in range(1, len(local) + 1):
        if at == len(local) or local[at] != local[at - 1] + 1:
            runs.append(Segment(local[first], at - first))
            first = at
    return runs


def _split(piece: _Piece) -> list[_Piece]:
    step = _MOST_MASKED_QUERIES
    return [
        _Piece(piece.segment, low, min(low + step, piece.high), piece.start + low - piece.low)
        for low in range(piece.low, piece.high, step)
    ]


def _bucket(pieces: Sequence[_Piece], *, is_masked: bool) -> list[list[_Piece]]:
    """Group pieces of similar size; equal ones keep the stream's order."""
    ordered = sorted(pieces, key=lambda p: (-p.num_keys, -p.num_queries, p.start))
    buckets: list[list[_Piece]] = []
    for piece in ordered:
        if buckets and _fits(piece, buckets[-1], is_masked=is_masked):
            buckets[-1].append(piece)
        else:
            buckets.append([piece])
    return buckets


def _fits(piece: _Piece, bucket: Sequence[_Piece], *, is_masked: bool) -> bool:
    first = bucket[0]
    most = _most_queries(bucket) if is_masked else first.num_queries
    if piece.num_keys < _LEAST_FILL * first.num_keys or piece.num_queries < _LEAST_FILL * most:
        return False
    elements = (len(bucket) + 1) * max(most, piece.num_queries) * first.num_keys
    return not is_masked or elements <= _MOST_MASK_ELEMENTS


@dataclass(frozen=True)
class _Indices:
    """Where the queries and keys of a block lie, flattened; what fills up lies at 0."""

    queries: torch.Tensor
    keys: torch.Tensor


def _gather(bucket: Sequence[_Piece], places: torch.Tensor | None) -> _Indices:
    queries = torch.zeros((len(bucket), _most_queries(bucket)), dtype=torch.int64)
    keys = torch.zeros((len(bucket), _most_keys(bucket)), dtype=torch.int64)
    for row, piece in enumerate(bucket):
        stop = piece.start + piece.num_queries
        queries[row, : piece.num_queries] = torch.arange(piece.start, stop)
        prefix, before = piece.segment.prefix, piece.segment.first_position
        if prefix is not None:
            keys[row, :before] = torch.arange(prefix.start, prefix.start + before)
        start = piece.segment.start
        keys[row, before : before + piece.high] = torch.arange(start, start + piece.high)
    return _Indices(queries.flatten(), (keys if places is None else places[keys]).flatten())


def _build_block(
    bucket: Sequence[_Piece],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device | None,
    *,
    can_view: bool,
) -> AttentionBlock:
    num_queries, num_keys = _most_queries(bucket), _most_keys(bucket)
    if window is None and all(p.segment.prefix is None and p.low == 0 for p in bucket):
        first = bucket[0].start if can_view else None
        return AttentionBlock(len(bucket), num_queries, num_keys, first)
    distance = _distances(bucket, num_queries, num_keys)
    mask = _to_scores(distance >= 0, dtype, device)
    windowed = None
    if window is not None:
        windowed = _to_scores((distance >= 0) & (distance <= window), dtype, device)
    offset = max(piece.segment.first_position + piece.low for piece in bucket)
    return AttentionBlock(len(bucket), num_queries, num_keys, None, mask, windowed, offset)


def _most_queries(bucket: Sequence[_Piece]) -> int:
    return max(piece.num_queries for piece in bucket)


def _most_keys(bucket: Sequence[_Piece]) -> int:
    return max(piece.num_keys for piece in bucket)


def _distances(bucket: Sequence[_Piece], num_queries: int, num_keys: int) -> torch.Tensor:
    """[batch, 1, queries, keys]: positions from key to query; negative where there is none."""
    firsts = torch.tensor([p.segment.first_position + p.low for p in bucket])
    counts = torch.tensor([p.num_queries for p in bucket])
    at = torch.arange(num_queries)
    positions = torch.where(at < counts[:, None], firsts[:, None] + at, -1)
    return (positions[:, :, None] - torch.arange(num_keys))[:, None]


def _to_scores(mask: torch.Tensor, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    """What is added to the scores: no layer has to convert the mask.

    A query that fills up looks at the first key, so that its softmax is defined.
    """
    mask[..., 0] |= ~mask.any(dim=-1)
    added = torch.zeros(mask.shape, dtype=dtype, device=device)
    return added.masked_fill_(~mask.to(device), float("-inf"))


def _is_contiguous(bucket: Sequence[_Piece]) -> bool:
    """Whether equally long whole rows lie one after another."""
    length = bucket[0].num_queries
    return all(
        piece.num_queries == piece.num_keys == length
        and piece.start == piece.segment.start == bucket[0].start + at * length
        for at, piece in enumerate(bucket)
    )


def _restore(groups: Sequence[Sequence[_Piece]], num_local: int) -> torch.Tensor | None:
    restore = torch.zeros(num_local, dtype=torch.int64)
    offset = 0
    for group in groups:
        num_queries = _most_queries(group)
        for row, piece in enumerate(group):
            begin = offset + row * num_queries
            restore[piece.start : piece.start + piece.num_queries] = torch.arange(
                begin, begin + piece.num_queries
            )
        offset += len(group) * num_queries
    is_ordered = offset == num_local and bool((restore == torch.arange(num_local)).all())
    return None if is_ordered else restore
