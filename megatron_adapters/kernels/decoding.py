# pyright: basic, reportMissingImports=false, reportIndexIssue=false
"""What a step of decoding does between its matrix products, in layers of the usual kind."""

import torch
import triton
import triton.language as tl

__all__ = ["add_and_normalize", "attend_rows", "can_attend_rows", "turn_and_write"]

# Keys of one pass of the attention's loop, and programs that keep a GPU busy.
_KEYS = 64
_PROGRAMS = 256
# Of the queries of a group, and of a key whose next ones are fetched while one is worked on: more
# does not fit into the shared memory of some GPUs.
_MOST_QUERY_BYTES = 1 << 15
_MOST_FETCHED_BYTES = 256
# Fewest keys of a part, where the keys of a row are shared among programs.
_PART = 256


def add_and_normalize(
    hidden: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """`hidden += change`, and the root mean square norm of the sum.

    Args:
        hidden: [rows, size], dense; changed in place.
        change: [rows, size], dense; None: nothing is added.
        weight: [size].
        eps: see `megatron_adapters.fused.rms_norm`.

    Returns:
        [rows, size].
    """
    rows, size = hidden.shape
    out = torch.empty_like(hidden)
    _add_and_normalize[(rows,)](
        hidden,
        hidden if change is None else change,
        weight,
        out,
        size,
        eps,
        HAS_CHANGE=change is not None,
        SIZE=triton.next_power_of_2(size),
    )
    return out


def turn_and_write(
    mixed: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> torch.Tensor:
    """Rotary positions of queries and keys; keys and values go to the cache.

    Args:
        mixed: [rows, groups, heads of a group + 2, size], dense: queries, key and value.
        tables: cosines and sines of all positions, [positions, angles] each, in the dtype of
            `mixed`; None: no rotary positions.
        positions: [rows] int64.
        slots: [rows] int64.
        keys: [slots, groups, length, size], dense; written to.
        values: the same.

    Returns:
        Queries, [rows, groups, heads of a group, size].
    """
    rows, groups, width, size = mixed.shape
    queries = mixed.new_empty((rows, groups, width - 2, size))
    cos, sin = tables if tables is not None else (mixed, mixed)
    angles = cos.shape[-1] if tables is not None else 0
    _turn_and_write[(rows, groups)](
        mixed,
        cos,
        sin,
        positions,
        slots,
        queries,
        keys,
        values,
        groups,
        width,
        size,
        angles,
        keys.shape[2],
        WIDTH=triton.next_power_of_2(width),
        ANGLES=triton.next_power_of_2(angles) if angles else 0,
        REST=triton.next_power_of_2(size - 2 * angles) if size > 2 * angles else 0,
        SIZE=triton.next_power_of_2(size),
    )
    return queries


def can_attend_rows(heads: int, size: int, dtype: torch.dtype) -> bool:
    """Whether `attend_rows` finds room on any GPU for a group's queries.

    Args:
        heads: of a group.
        size: of a head.
        dtype: of queries, keys and values.
    """
    return _pad(heads) * _pad(size) * dtype.itemsize <= _MOST_QUERY_BYTES


def attend_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    *,
    longest: int,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of one token a slot to the keys of its slot up to its position.

    Only keys that a row sees are read. Where rows and groups are too few for a GPU, the keys of
    each are shared among several programs, whose results a second kernel puts together.

    Args:
        queries: [rows, groups, heads of a group, size], dense.
        keys: [slots, groups, length, size], dense; row i sees slot i.
        values: the same.
        positions: [rows] int64, of the rows' own keys, the last that they see.
        scale: of the scores.
        longest: no row sees more keys.
        window: how many earlier keys a row sees; None: all.

    Returns:
        [rows, groups * heads of a group * size].
    """
    rows, groups, heads, size = queries.shape
    out = queries.new_empty((rows, groups * heads * size))
    parts = _count_parts(rows * groups, longest)
    span = triton.cdiv(triton.cdiv(longest, parts), _KEYS) * _KEYS
    # Of each part the weighted values, the largest score, and the sum of weights.
    shape = (parts if parts > 1 else 0, rows * groups, heads)
    scratch = [
        torch.empty(dims, dtype=torch.float32, device=queries.device)
        for dims in ((*shape, size), shape, shape)
    ]
    tiles = {"HEADS": _pad(heads), "SIZE": _pad(size)}
    is_small = _pad(size) * queries.element_size() <= _MOST_FETCHED_BYTES
    _attend_rows[(rows, groups, parts)](
        queries,
        keys,
        values,
        positions,
        out,
        *scratch,
        scale * 1.4426950408889634,
        groups,
        heads,
        size,
        keys.shape[2],
        span,
        0 if window is None else window,
        HAS_WINDOW=window is not None,
        HAS_PARTS=parts > 1,
        KEYS=_KEYS,
        **tiles,
        num_stages=3 if is_small else 1,
    )
    if parts > 1:
        _join_parts[(rows * groups,)](
            *scratch, out, rows * groups, heads, size, parts, **tiles, num_warps=2
        )
    return out


def _pad(count: int) -> int:
    """Matrix products take powers of 2 from 16 on."""
    return max(16, triton.next_power_of_2(count))


def _count_parts(num_programs: int, longest: int) -> int:
    wanted = triton.cdiv(_PROGRAMS, num_programs)
    return max(1, min(wanted, longest // _PART))


@triton.jit
def _add_and_normalize(
    hidden, change, weight, out, size, eps, HAS_CHANGE: tl.constexpr, SIZE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * size
    at = tl.arange(0, SIZE)
    is_in = at < size
    values = tl.load(hidden + row + at, is_in, 0.0)
    if HAS_CHANGE:
        added = tl.load(change + row + at, is_in, 0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(hidden.dtype.element_ty)
        tl.store(hidden + row + at, values, is_in)
    values = values.to(tl.float32)
    share = tl.rsqrt(tl.sum(values * values) / size + eps)
    gain = tl.load(weight + at, is_in, 0.0).to(tl.float32)
    tl.store(out + row + at, (values * share * gain).to(out.dtype.element_ty), is_in)


@triton.jit
def _turn_and_write(
    mixed,
    cos,
    sin,
    positions,
    slots,
    queries,
    keys,
    values,
    groups,
    width,
    size,
    angles,
    length,
    WIDTH: tl.constexpr,
    ANGLES: tl.constexpr,
    REST: tl.constexpr,
    SIZE: tl.constexpr,
):
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position, slot = tl.load(positions + row), tl.load(slots + row)
    source = mixed + (row * groups + group) * width * size
    place = ((slot * groups + group) * length + position) * size
    whole = tl.arange(0, SIZE)
    value = tl.load(source + (width - 1) * size + whole, whole < size, 0.0)
    tl.store(values + place + whole, value, whole < size)
    head = tl.arange(0, WIDTH)[:, None]
    own = queries + (row * groups + group) * (width - 2) * size + head * size
    if ANGLES > 0:
        at = tl.arange(0, ANGLES)[None, :]
        is_in = (head < width - 1) & (at < angles)
        turn_cos = tl.load(cos + position * angles + at, at < angles, 0.0).to(tl.float32)
        turn_sin = tl.load(sin + position * angles + at, at < angles, 0.0).to(tl.float32)
        one = tl.load(source + head * size + at, is_in, 0.0).to(tl.float32)
        two = tl.load(source + head * size + angles + at, is_in, 0.0).to(tl.float32)
        first = (one * turn_cos - two * turn_sin).to(queries.dtype.element_ty)
        second = (two * turn_cos + one * turn_sin).to(queries.dtype.element_ty)
        is_query, is_key = is_in & (head < width - 2), is_in & (head == width - 2)
        tl.store(own + at, first, is_query)
        tl.store(own + angles + at, second, is_query)
        cached = keys + place + at + tl.zeros_like(head)
        tl.store(cached, first, is_key)
        tl.store(cached + angles, second, is_key)
    if REST > 0:
        rest = 2 * angles + tl.arange(0, REST)[None, :]
        is_rest = (head < width - 1) & (rest < size)
        kept = tl.load(source + head * size + rest, is_rest, 0.0)
        tl.store(own + rest, kept, is_rest & (head < width - 2))
        tl.store(keys + place + rest + tl.zeros_like(head), kept, is_rest & (head == width - 2))


@triton.jit
def _attend_rows(
    queries,
    keys,
    values,
    positions,
    out,
    part_sums,
    part_peaks,
    part_weights,
    scale,
    groups,
    heads,
    size,
    length,
    span,
    window,
    HAS_WINDOW: tl.constexpr,
    HAS_PARTS: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    row, group, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + row)
    first = part * span
    stop = tl.minimum(first + span, position + 1)
    least = position * 0
    if HAS_WINDOW:
        least = tl.maximum(position - window, 0)
        first = tl.maximum(first, least // KEYS * KEYS)
    head = tl.arange(0, HEADS)
    at = tl.arange(0, SIZE)
    own = (row * groups + group) * heads
    is_own = (head[:, None] < heads) & (at[None, :] < size)
    query = tl.load(queries + (own + head[:, None]) * size + at[None, :], is_own, 0.0)
    base = (row * groups + group) * length * size
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, SIZE], tl.float32)
    for start in range(first, stop, KEYS):
        number = start + tl.arange(0, KEYS)
        is_seen = (number >= least) & (number < stop)
        place = base + number[:, None] * size + at[None, :]
        is_there = is_seen[:, None] & (at[None, :] < size)
        key = tl.load(keys + place, is_there, 0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        above = tl.maximum(peak, tl.max(scores, 1))
        # A part may begin with keys of which it sees none.
        level = tl.where(above == float("-inf"), 0.0, above)
        shares = tl.exp2(scores - level[:, None])
        shrink = tl.exp2(peak - level)
        value = tl.load(values + place, is_there, 0.0)
        weight = weight * shrink + tl.sum(shares, 1)
        total = total * shrink[:, None] + tl.dot(
            shares.to(value.dtype), value, input_precision="ieee"
        )
        peak = above
    if HAS_PARTS:
        rows_of_part = (part * tl.num_programs(0) * groups).to(tl.int64) * heads + own
        tl.store(part_sums + (rows_of_part + head[:, None]) * size + at[None, :], total, is_own)
        tl.store(part_peaks + rows_of_part + head, peak, head < heads)
        tl.store(part_weights + rows_of_part + head, weight, head < heads)
    else:
        result = total / weight[:, None]
        place = out + (own + head[:, None]) * size + at[None, :]
        tl.store(place, result.to(out.dtype.element_ty), is_own)


@triton.jit
def _join_parts(
    part_sums,
    part_peaks,
    part_weights,
    out,
    num_rows,
    heads,
    size,
    parts,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    own = tl.program_id(0).to(tl.int64) * heads
    head = tl.arange(0, HEADS)
    at = tl.arange(0, SIZE)
    is_own = (head[:, None] < heads) & (at[None, :] < size)
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    weight = tl.zeros([HEADS], tl.float32)
    total = tl.zeros([HEADS, SIZE], tl.float32)
    for part in range(parts):
        first = part * num_rows * heads + own
        new = tl.load(part_peaks + first + head, head < heads, float("-inf"))
        above = tl.maximum(peak, new)
        level = tl.where(above == float("-inf"), 0.0, above)
        old_share, new_share = tl.exp2(peak - level), tl.exp2(new - level)
        added = tl.load(part_weights + first + head, head < heads, 0.0)
        sums = tl.load(part_sums + (first + head[:, None]) * size + at[None, :], is_own, 0.0)
        weight = weight * old_share + added * new_share
        total = total * old_share[:, None] + sums * new_share[:, None]
        peak = above
    result = total / weight[:, None]
    tl.store(
        out + (own + head[:, None]) * size + at[None, :], result.to(out.dtype.element_ty), is_own
    )
