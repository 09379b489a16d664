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
    tight = [_fill(lane, limits) for lane in lanes]
    count = max(1, *map(len, tight))
    return tuple(
        tuple(
            tuple(row_ids[row.position] for row in part)
            for part in _order(_level_out(lane, own, count, limits), count)
        )
        for lane, own in zip(lanes, tight, strict=True)
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
            self.tokens += self.cost([row])
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
    return sorted(pieces, key=lambda piece: (-_Bin().cost(piece), piece[0].position))


def _cut_group(rows: Sequence[_Row], limits: Limits) -> list[list[_Row]]:
    """Rows of one prompt in as many pieces as the limits demand."""
    pieces: list[_Bin] = []
    for row in rows:
        if not pieces or not pieces[-1].fits([row], limits):
            pieces.append(_Bin())
        pieces[-1].add([row])
    return [piece.rows for piece in pieces]


def _spread(rows: Sequence[_Row], num_lanes: int) -> list[_Bin]:
    """Rows over lanes: prompts whole, the largest first, each to the emptiest lane."""
    plain = _runs(rows, num_lanes)
    if num_lanes == 1 or not rows:
        return plain
    groups = _group(rows)
    share = -(-sum(_Bin().cost(group) for group in groups) // num_lanes)
    limits = Limits(tokens=share)
    pieces = [piece for group in groups for piece in _cut_group(group, limits)]
    lanes = [_Bin() for _ in range(num_lanes)]
    emptiest = [(0, at) for at in range(num_lanes)]
    for piece in _largest_first(pieces):
        _, at = heapq.heappop(emptiest)
        lanes[at].add(piece)
        heapq.heappush(emptiest, (lanes[at].tokens, at))
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


def _fill(rows: Sequence[_Row], limits: Limits) -> list[_Bin]:
    """As few micro-batches as first fit, the largest first, finds."""
    bins: list[_Bin] = []
    pieces = [piece for group in _group(rows) for piece in _cut_group(group, limits)]
    for piece in _largest_first(pieces):
        found = next((each for each in bins if each.fits(piece, limits)), None)
        if found is None:
            bins.append(found := _Bin())
        found.add(piece)
    return bins


def _level_out(
    rows: Sequence[_Row], tight: Sequence[_Bin], count: int, limits: Limits
) -> Sequence[_Bin]:
    """The same rows over `count` micro-batches, as even as they come; `tight` is a valid cut."""
    even = _try_even(rows, count, limits)
    plain = _runs(rows, count)
    found = [tight if even is None else even]
    if all(each.is_within(limits) for each in plain):
        found.insert(0, plain)
    # A lane's micro-batches follow each other: the sum decides.
    return min(found, key=lambda bins: (_total(bins), _fullest(bins)))


def _try_even(rows: Sequence[_Row], count: int, limits: Limits) -> list[_Bin] | None:
    """The largest prompts first, each to the emptiest bin that takes it; None: one had none."""
    bins = [_Bin() for _ in range(count)]
    pieces = [piece for group in _group(rows) for piece in _cut_group(group, limits)]
    for piece in _largest_first(pieces):
        open_bins = [each for each in bins if each.fits(piece, limits)]
        if not open_bins:
            return None
        min(open_bins, key=lambda each: each.tokens + each.cost(piece)).add(piece)
    return bins


def _order(bins: Iterable[_Bin], count: int) -> list[list[_Row]]:
    """Bins by their first row, then empty ones up to `count`."""
    filled = sorted(sorted(each.rows) for each in bins if each.rows)
    return [*filled, *([] for _ in range(count - len(filled)))]
