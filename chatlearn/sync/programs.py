"""What each rank does in a sync, cut from the plan: steps, pulls, exports and blocks. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import NamedTuple

from chatlearn.parallel.sharding import Box
from chatlearn.sync.records import ITEM_BYTES, LINKS, Bucket, Hop, SyncPlan

__all__ = [
    "BLOCK_ELEMENTS",
    "NUM_TURNS",
    "Block",
    "Described",
    "Part",
    "Pull",
    "RankProgram",
    "Step",
    "build_programs",
    "first_awaited",
    "first_taken",
]

# One sync checks the blocks of one turn; after so many syncs every block has been checked.
NUM_TURNS = 64
BLOCK_ELEMENTS = 1 << 20
# Pieces from this size on are messages of their own.
_ALONE_BYTES = 1 << 18
_PROCESS = LINKS.index("process")


@dataclass(frozen=True)
class Part:
    """A box of a tensor as one rank holds it: a region of a local tensor."""

    key: str
    local_name: str
    slices: tuple[slice, ...]

    @property
    def label(self) -> str:
        """How messages name it."""
        shown = ", ".join(f"{each.start}:{each.stop}" for each in self.slices)
        return f"{self.key} (local {self.local_name}, slice [{shown}])"


@dataclass(frozen=True)
class Step:
    """One message of a bucket, sent to or received from a peer over the channel.

    `message` is the bucket and the number of the message within it, the same on both sides.
    """

    is_send: bool
    peer: int
    message: tuple[int, int]
    dtype: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Pull:
    """One bucket that this rank copies out of another rank's tensors."""

    source: int
    source_parts: tuple[Part, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Block:
    """A small box whose digest source and destination compare.

    Attributes:
        number: the same on both sides; `number % NUM_TURNS` is its turn.
        origin: endpoint whose digest counts.
        part: where it lies on this rank.
        dtype: the destination's, in which both sides compute.
    """

    number: int
    origin: int
    part: Part
    dtype: str


class Described(NamedTuple):
    """What a local tensor must be like for the plan to fit it."""

    key: str
    dtype: str
    least_shape: tuple[int, ...]


@dataclass
class RankProgram:
    """Everything one endpoint does in a sync.

    Attributes:
        index: of the endpoint.
        is_destination: whether it gets weights.
        steps: over the channel, in the order that all ranks follow.
        pulls: out of tensors of other ranks, after the steps.
        exported: local names that ranks of other processes pull from.
        lent: local names that models of the same process pull from.
        blocks: as origin or as taker.
        num_neighbours: destinations on the node of this one, itself included.
        described: dtype and least shape of each local tensor that moves, as described.
    """

    index: int
    is_destination: bool
    steps: list[Step] = field(default_factory=list[Step])
    pulls: list[Pull] = field(default_factory=list[Pull])
    exported: set[str] = field(default_factory=set[str])
    lent: set[str] = field(default_factory=set[str])
    blocks: list[Block] = field(default_factory=list[Block])
    num_neighbours: int = 1
    described: dict[str, Described] = field(default_factory=dict[str, Described])
    _by_turn: dict[int, list[Block]] = field(default_factory=dict[int, list[Block]])

    def blocks_of_turn(self, turn: int) -> Sequence[Block]:
        """The blocks that a sync of this turn checks."""
        if not self._by_turn:
            for block in self.blocks:
                self._by_turn.setdefault(block.number % NUM_TURNS, []).append(block)
        return self._by_turn.get(turn, ())

    @property
    def sources(self) -> set[int]:
        """Endpoints whose offers this rank needs."""
        if not self.is_destination:
            return set()
        return {pull.source for pull in self.pulls} | {block.origin for block in self.blocks}


def build_programs(plan: SyncPlan, is_sent: Callable[[Hop], bool]) -> tuple[RankProgram, ...]:
    """The programs of all endpoints.

    Args:
        plan: from `plan_sync`.
        is_sent: whether a hop goes over the channel; else its receiver pulls.
    """
    programs = tuple(
        RankProgram(index, index >= plan.num_sources) for index in range(len(plan.endpoints))
    )
    takers_of = Counter(endpoint.node_id for endpoint in plan.endpoints[plan.num_sources :])
    for program, endpoint in zip(programs, plan.endpoints, strict=True):
        program.num_neighbours = max(1, takers_of[endpoint.node_id])
    origins: dict[int, int] = {}
    takers: dict[int, list[int]] = {}
    for hop in plan.hops:
        origins.setdefault(hop.bucket, hop.source)
        takers.setdefault(hop.bucket, []).append(hop.destination)
        _add_hop(plan, programs, hop, is_channel=is_sent(hop))
    number = 0
    for index, bucket in enumerate(plan.buckets):
        origin = origins[index]
        for box, at in _blocks(bucket):
            piece = bucket.pieces[at]
            dtype = piece.destination.dtype
            for rank in (origin, *takers[index]):
                part = _part(plan, bucket, at, rank, box)
                programs[rank].blocks.append(Block(number, origin, part, dtype))
            number += 1
    return programs


def first_awaited(programs: tuple[RankProgram, ...]) -> Mapping[int, str]:
    """For each endpoint that gives weights, a tensor that somebody awaits from it."""
    awaited: dict[int, str] = {}
    for program in programs:
        for pull in program.pulls:
            awaited.setdefault(pull.source, pull.parts[0].key)
        for step in program.steps:
            if step.is_send:
                awaited.setdefault(program.index, step.parts[0].key)
    return awaited


def first_taken(programs: tuple[RankProgram, ...]) -> Mapping[int, str]:
    """For each endpoint that gets weights, the first tensor that it takes."""
    taken: dict[int, str] = {}
    for program in programs:
        parts = [step.parts[0] for step in program.steps if not step.is_send]
        parts.extend(pull.parts[0] for pull in program.pulls[:1])
        if parts:
            taken[program.index] = parts[0].key
    return taken


def _add_hop(
    plan: SyncPlan, programs: tuple[RankProgram, ...], hop: Hop, *, is_channel: bool
) -> None:
    bucket = plan.buckets[hop.bucket]
    given = _parts(plan, bucket, hop.source)
    taken = _parts(plan, bucket, hop.destination)
    source, destination = programs[hop.source], programs[hop.destination]
    if is_channel:
        for number, span in enumerate(_messages(bucket)):
            message = (hop.bucket, number)
            there, here = hop.destination, hop.source
            source.steps.append(Step(True, there, message, bucket.dtype, given[span]))
            destination.steps.append(Step(False, here, message, bucket.dtype, taken[span]))
    else:
        names = {part.local_name for part in given}
        (source.lent if hop.link == _PROCESS else source.exported).update(names)
        destination.pulls.append(Pull(hop.source, given, taken))
    for program, parts in ((source, given), (destination, taken)):
        for piece, part in zip(bucket.pieces, parts, strict=True):
            is_own = program.index < plan.num_sources
            cell = piece.source if is_own else piece.destination
            known = program.described.get(part.local_name)
            stops = tuple(each.stop for each in part.slices)
            least = stops if known is None else tuple(map(max, known.least_shape, stops))
            program.described[part.local_name] = Described(part.key, cell.dtype, least)


def _messages(bucket: Bucket) -> Iterator[slice]:
    """How a bucket's pieces go on the wire: large ones alone, so that they need no packing."""
    start = 0
    for at, piece in enumerate(bucket.pieces):
        if piece.box.num_elements * ITEM_BYTES[bucket.dtype] >= _ALONE_BYTES:
            if start < at:
                yield slice(start, at)
            yield slice(at, at + 1)
            start = at + 1
    if start < len(bucket.pieces):
        yield slice(start, len(bucket.pieces))


def _parts(plan: SyncPlan, bucket: Bucket, rank: int) -> tuple[Part, ...]:
    return tuple(_part(plan, bucket, at, rank) for at in range(len(bucket.pieces)))


def _part(plan: SyncPlan, bucket: Bucket, at: int, rank: int, box: Box | None = None) -> Part:
    piece = bucket.pieces[at]
    cell = piece.source if rank < plan.num_sources else piece.destination
    shard = cell.shards[plan.groups[rank]]
    return Part(cell.key, shard.local_name, shard.local_slices(box or piece.box))


def _blocks(bucket: Bucket) -> Iterator[tuple[Box, int]]:
    """The boxes of at most `BLOCK_ELEMENTS` elements of a bucket, with their piece."""
    for at, piece in enumerate(bucket.pieces):
        for box in _cut(piece.box):
            yield box, at


def _cut(box: Box) -> Iterator[Box]:
    """Cut along leading axes to boxes of at most `BLOCK_ELEMENTS` elements."""
    steps: list[int] = []
    left = BLOCK_ELEMENTS
    for length in reversed(box.shape):
        steps.append(max(1, min(length, left)))
        left = left // length if left >= length else 1
    steps.reverse()
    starts = (range(0, n, step) for n, step in zip(box.shape, steps, strict=True))
    for corner in product(*starts):
        offset = tuple(a + b for a, b in zip(box.offset, corner, strict=True))
        shape = tuple(min(step, n - b) for step, n, b in zip(steps, box.shape, corner, strict=True))
        yield Box(offset, shape)
