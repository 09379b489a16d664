"""Which rows of a global batch go to which data-parallel lane and micro-batch. Pure.

Lanes and micro-batches are balanced by tokens. Rows of one prompt stay together where that keeps
the balance, since a model computes a prompt once for the rows that it sees side by side.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from chatlearn.data.rows import RowId

__all__ = ["Limits", "RowLoad", "count_tokens", "cut_batch", "measure_loads", "merge_loads"]

_RESPONSES = ("response_token_ids", "chosen_token_ids", "rejected_token_ids")
# Rows of a prompt go to different lanes where a lane would be this far above the mean.
_TOLERANCE = 0.02


class RowLoad(NamedTuple):
    """Tokens of one row: those of its prompt, and those of what follows it.

    A preference pair has both of its responses in `response`.
    """

    prompt: int = 0
    response: int = 0


@dataclass(frozen=True)
class Limits:
    """The most that one micro-batch holds; None: no limit."""

    rows: int | None = None
    tokens: int | None = None


def measure_loads(columns: Mapping[str, Sequence[Any]]) -> tuple[RowLoad, ...]:
    """The loads of rows by their columns of token ids; empty where there are none."""
    names = [name for name in ("prompt_token_ids", *_RESPONSES) if name in columns]
    if not names:
        return ()
    lengths = {name: [_length(value) for value in columns[name]] for name in names}
    count = len(lengths[names[0]])
    prompts = lengths.pop("prompt_token_ids", [0] * count)
    rest = [sum(parts) for parts in zip(*lengths.values(), strict=True)] or [0] * count
    return tuple(map(RowLoad, prompts, rest))


def merge_loads(loads: Iterable[RowLoad]) -> RowLoad:
    """The load of one row whose columns lie in several places."""
    prompt = response = 0
    for load in loads:
        prompt, response = max(prompt, load.prompt), max(response, load.response)
    return RowLoad(prompt, response)


def count_tokens(row_ids: Iterable[RowId], loads: Mapping[RowId, RowLoad]) -> int:
    """Tokens of rows that are computed together: each prompt counts once."""
    found = _Bin()
    found.add([_Row.of(at, row_id, loads) for at, row_id in enumerate(row_ids)])
    return found.tokens


def cut_batch(
    row_ids: Sequence[RowId],
    dp_size: int,
    limits: Limits,
    loads: Mapping[RowId, RowLoad] | None = None,
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

    Returns:
        For each lane its micro-batches; each row occurs exactly once.
    """
    rows = [_Row.of(at, row_id, loads or {}) for at, row_id in enumerate(row_ids)]
    lanes = [sorted(lane.rows) for lane in _spread(rows, dp_size)]
    pieces = [_cut_groups(_group(lane), limits) for lane in lanes]
    tight = [_pack(own, _fewest(own, limits), limits) for own in pieces]
    count = max(map(len, tight))
    cuts: list[Sequence[_Bin]] = []
    for lane, own, packed in zip(lanes, pieces, tight, strict=True):
        even = packed if len(packed) == count else _pack(own, count, limits)
        even = packed if len(even) > count else even
        cuts.append(_prefer_runs(lane, even, count, limits))
    return tuple(
        tuple(tuple(row_ids[row.position] for row in part) for part in _order(bins, count))
        for bins in cuts
    )


class _Row(NamedTuple):
    """One row of the batch; `prompt_key` is equal for rows that share a prompt."""

    position: int
    prompt_key: tuple[int, ...]
    prompt: int
    response: int

    @classmethod
    def of(cls, position: int, row_id: RowId, loads: Mapping[RowId, RowLoad]) -> _Row:
        load = loads.get(row_id, RowLoad())
        # What several samples of a prompt have before them may differ, say after other turns.
        key = (row_id.prompt, load.prompt) if load.prompt else (position,)
        return cls(position, key, load.prompt, max(load.response, 0 if load.prompt else 1))


@dataclass
class _Bin:
    """Rows that are computed together."""

    rows: list[_Row] = field(default_factory=list[_Row])
    tokens: int = 0
    prompts: Counter[tuple[int, ...]] = field(default_factory=Counter[tuple[int, ...]])

    def cost(self, rows: Sequence[_Row]) -> int:
        """Tokens that rows of one prompt would add."""
        shared = 0 if rows[0].prompt_key in self.prompts else rows[0].prompt
        return shared + sum(row.response for row in rows)

    def gain(self, row: _Row) -> int:
        """Tokens that go away with a row."""
        return row.response + (row.prompt if self.prompts[row.prompt_key] == 1 else 0)

    def add(self, rows: Iterable[_Row]) -> None:
        """Take rows in."""
        for row in rows:
            shared = 0 if row.prompt_key in self.prompts else row.prompt
            self.tokens += row.response + shared
            self.prompts[row.prompt_key] += 1
            self.rows.append(row)

    def remove(self, row: _Row) -> None:
        """Give a row away."""
        self.tokens -= self.gain(row)
        self.rows.remove(row)
        self.prompts[row.prompt_key] -= 1
        if not self.prompts[row.prompt_key]:
            del self.prompts[row.prompt_key]

    def fits(self, rows: Sequence[_Row], limits: Limits) -> bool:
        """Whether rows of one prompt may come in."""
        return _is_within(len(self.rows) + len(rows), self.tokens + self.cost(rows), limits)

    def is_within(self, limits: Limits) -> bool:
        """Whether this is a micro-batch that may be."""
        return _is_within(len(self.rows), self.tokens, limits)


def _is_within(num_rows: int, num_tokens: int, limits: Limits) -> bool:
    """A row alone always is."""
    if num_rows <= 1:
        return True
    if limits.rows is not None and num_rows > limits.rows:
        return False
    return limits.tokens is None or num_tokens <= limits.tokens


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 0


def _fill_bins(parts: Iterable[Sequence[_Row]]) -> list[_Bin]:
    bins: list[_Bin] = []
    for part in parts:
        bins.append(_Bin())
        bins[-1].add(part)
    return bins


def _runs(rows: Sequence[_Row], count: int) -> list[_Bin]:
    """Consecutive rows, as evenly many in each bin as can be."""
    base, extra = divmod(len(rows), count)
    stops = [at * base + min(at, extra) for at in range(count + 1)]
    return _fill_bins(rows[start:stop] for start, stop in zip(stops, stops[1:], strict=False))


def _fullest(bins: Sequence[_Bin]) -> int:
    return max(each.tokens for each in bins)


def _total(bins: Sequence[_Bin]) -> int:
    return sum(each.tokens for each in bins)


def _group(rows: Iterable[_Row]) -> list[list[_Row]]:
    """Rows by prompt, in the order of their first row."""
    groups: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt_key, []).append(row)
    return list(groups.values())


def _largest_first(pieces: Iterable[list[_Row]]) -> list[list[_Row]]:
    return sorted(pieces, key=lambda piece: (-_cost(piece), piece[0].position))


def _cost(rows: Sequence[_Row]) -> int:
    """Tokens of rows of one prompt by themselves."""
    return rows[0].prompt + sum(row.response for row in rows)


def _cut_groups(groups: Iterable[Sequence[_Row]], limits: Limits) -> list[list[_Row]]:
    """Rows of each prompt in as many pieces as the limits demand, the largest first."""
    pieces: list[list[_Row]] = []
    for group in groups:
        if _is_within(len(group), _cost(group), limits):
            pieces.append(list(group))
            continue
        current = _Bin()
        for row in group:
            if not current.fits([row], limits):
                pieces.append(current.rows)
                current = _Bin()
            current.add([row])
        pieces.append(current.rows)
    return _largest_first(pieces)


def _spread(rows: Sequence[_Row], num_lanes: int) -> list[_Bin]:
    """Rows over lanes: prompts whole, the largest first, each to the emptiest lane."""
    plain = _runs(rows, num_lanes)
    if num_lanes == 1 or not rows:
        return plain
    groups = _group(rows)
    share = -(-sum(map(_cost, groups)) // num_lanes)
    lanes = _pack(_cut_groups(groups, Limits(tokens=share)), num_lanes, Limits())
    _move_rows(lanes, len(rows))
    # Lanes work side by side: the fullest decides.
    return min(plain, lanes, key=lambda bins: (_fullest(bins), _total(bins)))


def _move_rows(lanes: Sequence[_Bin], most_moves: int) -> None:
    """Move single rows from the fullest lane to the emptiest while that lowers the fullest."""
    for _ in range(most_moves):
        full = max(lanes, key=lambda lane: lane.tokens)
        empty = min(lanes, key=lambda lane: lane.tokens)
        mean = sum(lane.tokens for lane in lanes) / len(lanes)
        if full.tokens <= mean * (1.0 + _TOLERANCE):
            return
        top, row = min(
            (max(full.tokens - full.gain(row), empty.tokens + empty.cost([row])), row)
            for row in full.rows
        )
        if top >= full.tokens:
            return
        full.remove(row)
        empty.add([row])


def _fewest(pieces: Sequence[Sequence[_Row]], limits: Limits) -> int:
    """No fewer micro-batches can hold these."""
    by_rows = by_tokens = 1
    if limits.rows is not None:
        by_rows = -(-sum(map(len, pieces)) // limits.rows)
    if limits.tokens is not None:
        # A row that is longer is one micro-batch. Pieces of one prompt may come together again.
        tokens = sum(min(_cost(piece), limits.tokens) for piece in pieces)
        by_tokens = -(-tokens // limits.tokens)
    return max(1, by_rows, min(by_tokens, len(pieces)))


def _pack(pieces: Iterable[Sequence[_Row]], count: int, limits: Limits) -> list[_Bin]:
    """Each piece to the emptiest of `count` bins that takes it, or to a new one."""
    bins = [_Bin() for _ in range(count)]
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
            if limits.tokens is not None and tokens + _cost(piece) > limits.tokens:
                break
        if chosen == len(bins):
            bins.append(_Bin())
        bins[chosen].add(piece)
        for tokens, at in (*refused, (bins[chosen].tokens, chosen)):
            # A bin that is full of rows takes nothing more.
            if limits.rows is None or len(bins[at].rows) < limits.rows:
                heapq.heappush(emptiest, (tokens, at))
    return bins


def _prefer_runs(
    rows: Sequence[_Row], even: Sequence[_Bin], count: int, limits: Limits
) -> Sequence[_Bin]:
    """Runs of the rows' own order instead of `even`, where they are valid and cost no more."""
    plain = _runs(rows, count)
    if not all(each.is_within(limits) for each in plain):
        return even
    # A lane's micro-batches follow each other: the sum decides.
    return min(plain, even, key=lambda bins: (_total(bins), _fullest(bins)))


def _order(bins: Iterable[_Bin], count: int) -> list[list[_Row]]:
    """Bins by their first row, then empty ones up to `count`."""
    filled = sorted(sorted(each.rows) for each in bins if each.rows)
    return [*filled, *([] for _ in range(count - len(filled)))]
