"""The records of a weight sync's plan: who takes part, what moves, from whom to whom, and when.

Pure and frozen; `chatlearn.sync.plan` makes them, `chatlearn.sync.programs` cuts them to ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from chatlearn.parallel.sharding import Box, TensorShard

__all__ = [
    "FLOAT_DTYPES",
    "ITEM_BYTES",
    "LINKS",
    "Bucket",
    "Cell",
    "Endpoint",
    "Hop",
    "Piece",
    "SyncPlan",
]

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
# Any of these can be rounded to any other; every narrower one's values are among the wider one's.
FLOAT_DTYPES = frozenset(name for name in ITEM_BYTES if "float" in name)
# Kinds of links, shortest first; a hop's `link` indexes this tuple.
LINKS = ("process", "device", "node", "network")


@dataclass(frozen=True)
class Endpoint:
    """One rank that takes part, and the shards it holds.

    Attributes:
        model_name: its model.
        replica: its replica of the model.
        rank: its rank within the replica.
        node_id: equal for ranks of one host.
        process_id: equal for ranks of one process (on one host).
        shards: what it holds. Ranks that hold the same may share one tuple, which the planner
            groups by; that is what makes thousands of data-parallel ranks cheap.
        device_id: equal for ranks on one device (of one host); empty on the CPU.
        frozen: local names of the weights that training never changes.
        is_late: its weights are brought up to date when a sync begins.
    """

    model_name: str
    replica: int
    rank: int
    node_id: str
    process_id: int
    shards: tuple[TensorShard, ...]
    device_id: str = ""
    frozen: frozenset[str] = field(default_factory=frozenset[str])
    is_late: bool = False

    @property
    def label(self) -> str:
        """How messages name it."""
        return f"{self.model_name}.r{self.replica}.{self.rank}"


@dataclass(frozen=True, eq=False)
class Cell:
    """One box of one tensor, with everyone who holds exactly it.

    Attributes:
        key: the tensor.
        box: the part of it.
        dtype: as held.
        holders: indices of endpoints, ascending; cells with the same holders share the tuple.
        shards: where the box lies, by the index of a group of equal endpoints.
    """

    key: str
    box: Box
    dtype: str
    holders: tuple[int, ...]
    shards: Mapping[int, TensorShard]


class Piece(NamedTuple):
    """A box that moves: the common part of a source's cell and a destination's."""

    box: Box
    source: Cell
    destination: Cell


class Bucket(NamedTuple):
    """Pieces with the same holders and takers and one dtype on the wire, moved together.

    Attributes:
        pieces: what is in it, in order.
        dtype: on the wire: the narrower of the two sides' dtypes, else the destination's.
        num_bytes: of one copy, on the wire.
    """

    pieces: tuple[Piece, ...]
    dtype: str
    num_bytes: int


class Hop(NamedTuple):
    """One bucket from one endpoint to another.

    Attributes:
        round: hops of one round have no two with the same sender or the same receiver on the
            network, so they can all run at once.
        bucket: index into the plan's buckets.
        source: index of the sending endpoint: a source, or a destination that has the bucket
            from an earlier round.
        destination: index of the receiving endpoint.
        link: index into `LINKS`.
    """

    round: int
    bucket: int
    source: int
    destination: int
    link: int


@dataclass(frozen=True)
class SyncPlan:
    """What moves in one sync.

    Attributes:
        endpoints: sources first, then destinations.
        num_sources: how many of the endpoints are sources.
        groups: for each endpoint, the index of its group of endpoints that hold the same
            shards; the key of `Cell.shards`.
        buckets: what is moved; a large box is cut to several.
        hops: who sends which bucket to whom, by round. Every rank that works through its hops
            in this order finishes: the earliest unfinished hop has both its ends waiting.
        bytes_by_link: payload by kind of link.
        unused_keys: source tensors that the destination does without.
        skipped_keys: tensors left out because they do not change.
    """

    endpoints: tuple[Endpoint, ...]
    num_sources: int
    groups: tuple[int, ...]
    buckets: tuple[Bucket, ...]
    hops: tuple[Hop, ...]
    bytes_by_link: Mapping[str, int]
    unused_keys: tuple[str, ...] = ()
    skipped_keys: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes that are moved, all links together."""
        return sum(self.bytes_by_link.values())

    @property
    def num_rounds(self) -> int:
        """Rounds until the last hop is done."""
        return self.hops[-1].round + 1 if self.hops else 0
