"""Rows of a global batch over lanes that work side by side. Pure.

A lane computes its rows in pieces: rows of one prompt that fit into one micro-batch. A piece costs
its prompt and what follows it, whatever it is packed with; so lanes that are even by the cost of
their pieces stay even after the cut to micro-batches.
"""

from __future__ import annotations

import bisect
import heapq
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from chatlearn.data.bins import Bin, Limits, Row, cost_of, group_rows, is_within, responses_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

__all__ = ["cut_prompts", "run_bounds", "spread_rows"]

# Rows move between lanes where a lane is this far above the mean.
_TOLERANCE = 0.02
# How far above the least that could be lanes may be filled, from one try to the next.
_STEP = 0.01
# Prompts of more tokens than these parts of a lane's share are cut.
_PARTS = (1, 2)
# The emptiest lanes, with which the fullest may change pieces.
_NUM_PARTNERS = 8


def spread_rows(rows: Sequence[Row], num_lanes: int, limits: Limits) -> list[list[list[Row]]]:
    """The pieces of each lane, so that the fullest lane has little.

    The fullest lane is within 2 per cent of the mean, or no more than one prompt and one row above
    the emptiest: to give its cheapest row away would not help, since the other lane would have to
    compute the prompt, too.

    Args:
        rows: the global batch, in its order.
        num_lanes: lanes.
        limits: of a micro-batch.

    Returns:
        For each lane its pieces. Runs of the given order where nothing else is better.
    """
    plain = _plain_lanes(rows, num_lanes, limits)
    if num_lanes == 1 or not rows:
        return [lane.row_lists() for lane in plain]
    groups = group_rows(rows)
    least = sum(cost_of(piece) for piece in cut_prompts(groups, limits)) / num_lanes
    best: list[_Lane] = []
    for lanes in _starts(groups, num_lanes, limits, least):
        if _cost(lanes)[0] > least * (1.0 + _TOLERANCE):
            _level(lanes)
        best = min(best or lanes, lanes, key=_cost)
        if _cost(best)[0] <= least * (1.0 + _TOLERANCE):
            break
    if _cost(plain)[0] < _cost(best)[0]:
        _level(plain)
    return [lane.row_lists() for lane in min(plain, best, key=_cost)]


def cut_prompts(groups: Iterable[Sequence[Row]], limits: Limits) -> list[list[Row]]:
    """Rows of each prompt in as few pieces as the limits demand, the largest first."""
    pieces: list[list[Row]] = []
    for group in groups:
        if is_within(len(group), cost_of(group), limits):
            pieces.append(list(group))
            continue
        in_order = _first_fit(group, limits, are_all_open=False)
        by_size = sorted(group, key=lambda row: (-row.response, row.position))
        pieces += min(in_order, _first_fit(by_size, limits, are_all_open=True), key=len)
    return sorted(pieces, key=lambda piece: (-cost_of(piece), piece[0].position))


def run_bounds(num_rows: int, count: int) -> list[tuple[int, int]]:
    """Begin and end of consecutive runs, as evenly long as can be."""
    base, extra = divmod(num_rows, count)
    stops = [at * base + min(at, extra) for at in range(count + 1)]
    return list(zip(stops, stops[1:], strict=False))


@dataclass
class _Lane:
    """What one lane computes.

    Attributes:
        limits: of a piece.
        tokens: of all pieces.
        pieces: by prompt.
    """

    limits: Limits
    tokens: int = 0
    pieces: dict[tuple[int, ...], list[Bin]] = field(
        default_factory=dict[tuple[int, ...], list[Bin]]
    )

    def host(self, rows: Sequence[Row]) -> Bin | None:
        """The piece of the rows' own prompt that has room for them."""
        own = self.pieces.get(rows[0].prompt_key)
        if own is None:
            return None
        added, response = len(rows), responses_of(rows)
        for piece in own:
            if is_within(len(piece.rows) + added, piece.tokens + response, self.limits):
                return piece
        return None

    def cost(self, rows: Sequence[Row]) -> int:
        """Tokens that rows of one prompt would add."""
        return responses_of(rows) + (rows[0].prompt if self.host(rows) is None else 0)

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows of one prompt in."""
        self.tokens += self.cost(rows)
        piece = self.host(rows)
        if piece is None:
            piece = Bin()
            self.pieces.setdefault(rows[0].prompt_key, []).append(piece)
        piece.add(rows)

    def remove(self, piece: Bin, rows: Sequence[Row]) -> None:
        """Give rows of a piece away."""
        self.tokens -= _gain(piece, rows)
        for row in rows:
            piece.remove(row)
        if not piece.rows:
            key = rows[0].prompt_key
            self.pieces[key] = [each for each in self.pieces[key] if each is not piece]
            if not self.pieces[key]:
                del self.pieces[key]

    def all_pieces(self) -> Iterator[Bin]:
        """The pieces of all prompts."""
        return (piece for pieces in self.pieces.values() for piece in pieces)

    def row_lists(self) -> list[list[Row]]:
        """The rows of each piece, in the order of the batch."""
        return [sorted(piece.rows) for piece in self.all_pieces()]


class _Change(NamedTuple):
    """Rows that a lane gives to another, and what it gets; `top`: tokens of the fuller one then."""

    top: int
    to: _Lane
    piece: Bin
    rows: list[Row]
    back: Bin | None = None


def _first_fit(rows: Iterable[Row], limits: Limits, *, are_all_open: bool) -> list[list[Row]]:
    """Each row to the first piece that takes it; only the last one does, unless all are open."""
    pieces: list[list[Row]] = []
    tokens: list[int] = []
    for row in rows:
        for at in range(0 if are_all_open else max(0, len(pieces) - 1), len(pieces)):
            if is_within(len(pieces[at]) + 1, tokens[at] + row.response, limits):
                pieces[at].append(row)
                tokens[at] += row.response
                break
        else:
            pieces.append([row])
            tokens.append(row.prompt + row.response)
    return [sorted(piece) for piece in pieces]


def _plain_lanes(rows: Sequence[Row], num_lanes: int, limits: Limits) -> list[_Lane]:
    lanes = [_Lane(limits) for _ in range(num_lanes)]
    for lane, (begin, end) in zip(lanes, run_bounds(len(rows), num_lanes), strict=True):
        for piece in cut_prompts(group_rows(rows[begin:end]), limits):
            lane.add(piece)
    return lanes


def _fill_lanes(pieces: Iterable[list[Row]], num_lanes: int, limits: Limits) -> list[_Lane]:
    """Each piece to the lane that is emptiest with it."""
    lanes = [_Lane(limits) for _ in range(num_lanes)]
    emptiest = [(0, at) for at in range(num_lanes)]
    holders: dict[tuple[int, ...], list[int]] = {}
    for piece in pieces:
        # A lane's entry is renewed when it comes up: tokens only grow.
        while emptiest[0][0] != lanes[emptiest[0][1]].tokens:
            at = emptiest[0][1]
            heapq.heapreplace(emptiest, (lanes[at].tokens, at))
        own = holders.setdefault(piece[0].prompt_key, [])
        chosen = min(
            (emptiest[0][1], *own), key=lambda at: (lanes[at].tokens + lanes[at].cost(piece), at)
        )
        lanes[chosen].add(piece)
        own.append(chosen)
    return lanes


def _starts(
    groups: Sequence[list[Row]], num_lanes: int, limits: Limits, least: float
) -> Iterator[list[_Lane]]:
    """Ways to begin: prompts whole, in two parts, and as many parts as fill the lanes."""
    for part in _PARTS:
        tokens = max(1, int(least / part))
        within = replace(limits, tokens=min(tokens, limits.tokens or tokens))
        yield _fill_lanes(cut_prompts(groups, within), num_lanes, limits)
    pieces, step = cut_prompts(groups, limits), _STEP
    while True:
        most = int(least * (1.0 + step))
        for rank in (_by_size, _by_prompt):
            lanes = _try_to_fill(pieces, num_lanes, limits, most, rank)
            if lanes is not None:
                yield lanes
                return
        step *= 1.2


def _by_size(piece: list[Row]) -> int:
    """The largest first."""
    return -cost_of(piece)


def _by_prompt(piece: list[Row]) -> int:
    """The longest prompt first: the others are easier to divide, and fill what is left."""
    return -piece[0].prompt


def _try_to_fill(
    pieces: Iterable[list[Row]],
    num_lanes: int,
    limits: Limits,
    most: int,
    rank: Callable[[list[Row]], int],
) -> list[_Lane] | None:
    """Lanes of at most so many tokens, each piece to the fullest one that takes it.

    Of a piece that no lane takes the emptiest takes a part; None where there is no room for one.
    """
    lanes = [_Lane(limits) for _ in range(num_lanes)]
    waiting = [(rank(piece), piece) for piece in pieces]
    heapq.heapify(waiting)
    while waiting:
        _, piece = heapq.heappop(waiting)
        room = most - cost_of(piece)
        fitting = [lane for lane in lanes if lane.tokens <= room]
        if fitting:
            max(fitting, key=lambda lane: lane.tokens).add(piece)
            continue
        lane = min(lanes, key=lambda lane: lane.tokens)
        rows = sorted(piece, key=lambda row: (-row.response, row.position))
        part = _choose(rows, most - lane.tokens - rows[0].prompt, len(rows))
        if not part:
            return None
        lane.add(part)
        taken = set(part)
        rest = [row for row in piece if row not in taken]
        heapq.heappush(waiting, (rank(rest), rest))
    return lanes


def _cost(lanes: Sequence[_Lane]) -> tuple[int, int]:
    """Lanes work side by side: the fullest decides."""
    return max(lane.tokens for lane in lanes), sum(lane.tokens for lane in lanes)


def _level(lanes: Sequence[_Lane]) -> None:
    """Move rows out of the fullest lane while that lowers it."""
    while True:
        full = max(lanes, key=lambda lane: lane.tokens)
        if full.tokens <= sum(lane.tokens for lane in lanes) / len(lanes) * (1.0 + _TOLERANCE):
            return
        changes = [*_moves(lanes, full), *_swaps(lanes, full)]
        change = min(changes, key=lambda each: each.top, default=None)
        if change is None or change.top >= full.tokens:
            return
        full.remove(change.piece, change.rows)
        if change.back is not None:
            back = list(change.back.rows)
            change.to.remove(change.back, back)
            full.add(back)
        change.to.add(change.rows)


def _moves(lanes: Sequence[_Lane], full: _Lane) -> Iterator[_Change]:
    """What the fullest lane could give to the emptiest, and to those that have the prompt."""
    emptiest = min(lanes, key=lambda lane: lane.tokens)
    for piece in full.all_pieces():
        first = piece.rows[0]
        receivers = [emptiest]
        if first.prompt:
            receivers += [
                lane
                for lane in lanes
                if first.prompt_key in lane.pieces and lane is not emptiest and lane is not full
            ]
        for to in receivers:
            for rows in _choices(piece, to, full.tokens - to.tokens):
                top = max(full.tokens - _gain(piece, rows), to.tokens + to.cost(rows))
                yield _Change(top, to, piece, rows)


def _choices(piece: Bin, to: _Lane, gap: int) -> Iterator[list[Row]]:
    """Rows of a piece that may be worth moving: all, the smallest, and about half of the gap."""
    rows = sorted(piece.rows, key=lambda row: (-row.response, row.position))
    yield rows
    if len(rows) == 1:
        return
    yield rows[-1:]
    limits, prompt = to.limits, rows[0].prompt
    wanted = [((gap - prompt) // 2, len(rows))]
    for host in to.pieces.get(rows[0].prompt_key, ()):
        room = gap if limits.tokens is None else limits.tokens - host.tokens
        most = len(rows) if limits.rows is None else limits.rows - len(host.rows)
        wanted.append((min(gap // 2, room), most))
    for tokens, most in wanted:
        chosen = _choose(rows, tokens, most)
        if chosen:
            yield chosen


def _choose(rows: Iterable[Row], tokens: int, most: int) -> list[Row]:
    """The largest rows of up to so many tokens."""
    chosen: list[Row] = []
    for row in rows:
        if row.response <= tokens and len(chosen) < most:
            chosen.append(row)
            tokens -= row.response
    return chosen


def _swaps(lanes: Sequence[_Lane], full: _Lane) -> Iterator[_Change]:
    """Whole pieces that the fullest lane could change for smaller ones of a rather empty lane."""
    others = sorted((lane for lane in lanes if lane is not full), key=lambda lane: lane.tokens)
    for to in others[:_NUM_PARTNERS]:
        theirs = sorted(to.all_pieces(), key=lambda piece: piece.tokens)
        sizes = [piece.tokens for piece in theirs]
        for piece in full.all_pieces():
            at = bisect.bisect(sizes, piece.tokens - (full.tokens - to.tokens) / 2)
            for back in theirs[max(0, at - 1) : at + 1]:
                less = piece.tokens - back.tokens
                yield _Change(
                    max(full.tokens - less, to.tokens + less), to, piece, list(piece.rows), back
                )


def _gain(piece: Bin, rows: Sequence[Row]) -> int:
    """Tokens that go away with rows of a piece."""
    if len(rows) == len(piece.rows):
        return piece.tokens
    return responses_of(rows)
