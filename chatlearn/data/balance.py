"""Which rows of a global batch go to which data-parallel lane and micro-batch. Pure.

Lanes and micro-batches are balanced by tokens. Rows of one prompt stay together where that keeps
the balance, since most models compute a prompt once for the rows that they see side by side.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

from chatlearn.data.bins import Bin, Limits, Row, RowLoad, cost_of
from chatlearn.data.lanes import run_bounds, spread_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chatlearn.data.rows import RowId

__all__ = ["Limits", "RowLoad", "count_tokens", "cut_batch", "measure_loads", "merge_loads"]

_RESPONSES = ("response_token_ids", "chosen_token_ids", "rejected_token_ids")


def measure_loads(columns: Mapping[str, Sequence[Any]]) -> tuple[RowLoad, ...]:
    """The loads of rows by their columns of token ids; empty where there are none."""
    names = [name for name in ("prompt_token_ids", *_RESPONSES) if name in columns]
    if not names:
        return ()
    lengths = {name: [_length(value) for value in columns[name]] for name in names}
    count = len(lengths[names[0]])
    prompts = lengths.pop("prompt_token_ids", [0] * count)
    rest = [sum(parts) for parts in zip(*lengths.values(), strict=True)] or [0] * count
    copies = max(1, len(lengths))
    return tuple(RowLoad(*pair, copies) for pair in zip(prompts, rest, strict=True))


def merge_loads(loads: Iterable[RowLoad]) -> RowLoad:
    """The load of one row whose columns lie in several places."""
    found = list(loads)
    return RowLoad(*map(max, zip(*found, strict=True))) if found else RowLoad()


def count_tokens(row_ids: Iterable[RowId], loads: Mapping[RowId, RowLoad]) -> int:
    """Tokens of rows that are computed together: each prompt counts once."""
    found = Bin()
    found.add([Row.of(at, row_id, loads) for at, row_id in enumerate(row_ids)])
    return found.tokens


def cut_batch(
    row_ids: Sequence[RowId],
    dp_size: int,
    limits: Limits,
    loads: Mapping[RowId, RowLoad] | None = None,
    *,
    shares_prompts: bool = True,
) -> tuple[tuple[tuple[RowId, ...], ...], ...]:
    """Cut a global batch to data-parallel lanes, and each lane's rows to micro-batches.

    Every lane gets equally many micro-batches, some perhaps empty: collectives need the same
    count everywhere. The cut is a function of the arguments alone, and rows keep their order
    within a micro-batch. Where balance costs nothing, lanes and micro-batches are runs of the
    given order.

    Args:
        row_ids: the global batch.
        dp_size: lanes.
        limits: of a micro-batch; a row that is longer than the limit is one by itself.
        loads: tokens by row; a row without any counts as one token.
        shares_prompts: the model computes a prompt once for the rows of a micro-batch.

    Returns:
        For each lane its micro-batches; each row occurs exactly once.
    """
    loads = loads or {}
    if not shares_prompts:
        loads = {row_id: load.unshared for row_id, load in loads.items()}
    rows = [Row.of(at, row_id, loads) for at, row_id in enumerate(row_ids)]
    pieces = [_largest_first(lane) for lane in spread_rows(rows, dp_size, limits)]
    lanes = [sorted(row for piece in own for row in piece) for own in pieces]
    tight = [_pack(own, _fewest(own, limits), limits) for own in pieces]
    count = max(map(len, tight))
    cuts: list[Sequence[Bin]] = []
    for lane, own, packed in zip(lanes, pieces, tight, strict=True):
        even = packed if len(packed) == count else _pack(own, count, limits)
        even = packed if len(even) > count else even
        cuts.append(_prefer_runs(lane, even, count, limits))
    return tuple(
        tuple(tuple(row_ids[row.position] for row in part) for part in _order(bins, count))
        for bins in cuts
    )


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _fill_bins(parts: Iterable[Sequence[Row]]) -> list[Bin]:
    bins: list[Bin] = []
    for part in parts:
        bins.append(Bin())
        bins[-1].add(part)
    return bins


def _runs(rows: Sequence[Row], count: int) -> list[Bin]:
    """Consecutive rows, as evenly many in each bin as can be."""
    return _fill_bins(rows[begin:end] for begin, end in run_bounds(len(rows), count))


def _fullest(bins: Sequence[Bin]) -> int:
    return max(each.tokens for each in bins)


def _total(bins: Sequence[Bin]) -> int:
    return sum(each.tokens for each in bins)


def _largest_first(pieces: Iterable[list[Row]]) -> list[list[Row]]:
    return sorted(pieces, key=lambda piece: (-cost_of(piece), piece[0].position))


def _fewest(pieces: Sequence[Sequence[Row]], limits: Limits) -> int:
    """No fewer micro-batches can hold these."""
    by_rows = by_tokens = 1
    if limits.rows is not None:
        by_rows = -(-sum(map(len, pieces)) // limits.rows)
    if limits.tokens is not None:
        # A row that is longer is one micro-batch. Pieces of one prompt may come together again.
        tokens = sum(min(cost_of(piece), limits.tokens) for piece in pieces)
        by_tokens = -(-tokens // limits.tokens)
    return max(1, by_rows, min(by_tokens, len(pieces)))


def _pack(pieces: Iterable[Sequence[Row]], count: int, limits: Limits) -> list[Bin]:
    """Each piece to the emptiest of `count` bins that takes it, or to a new one."""
    bins = [Bin() for _ in range(count)]
    emptiest = [(0, at) for at in range(count)]
    for piece in pieces:
        refused: list[tuple[int, int]] = []
        chosen = len(bins)
        while emptiest:
            tokens, at = heapq.heappop(emptiest)
            if bins[at].fits(piece, limits):
                chosen = at
                break
            refused.append((tokens, at))
            if limits.tokens is not None and tokens + cost_of(piece) > limits.tokens:
                break
        if chosen == len(bins):
            bins.append(Bin())
        bins[chosen].add(piece)
        for tokens, at in (*refused, (bins[chosen].tokens, chosen)):
            # A bin that is full of rows takes nothing more.
            if limits.rows is None or len(bins[at].rows) < limits.rows:
                heapq.heappush(emptiest, (tokens, at))
    return bins


def _prefer_runs(
    rows: Sequence[Row], even: Sequence[Bin], count: int, limits: Limits
) -> Sequence[Bin]:
    """Runs of the rows' own order instead of `even`, where they are valid and cost no more."""
    plain = _runs(rows, count)
    if not all(each.is_within(limits) for each in plain):
        return even
    # A lane's micro-batches follow each other: the sum decides.
    return min(plain, even, key=lambda bins: (_total(bins), _fullest(bins)))


def _order(bins: Iterable[Bin], count: int) -> list[list[Row]]:
    """Bins by their first row, then empty ones up to `count`."""
    filled = sorted(sorted(each.rows) for each in bins if each.rows)
    return [*filled, *([] for _ in range(count - len(filled)))]
