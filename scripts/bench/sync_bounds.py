"""The fewest bytes that a weight sync can move, counted without the planner. Pure.

Each tensor is cut along every boundary that any shard has on any axis. The cells of that grid are
either wholly in a shard or wholly outside, so a mask over the grid counts elements exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from chatlearn.parallel.sharding import TensorShard
    from chatlearn.sync.records import Endpoint

__all__ = ["LeastBytes", "count_least_bytes"]

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class LeastBytes:
    """A lower bound on what crosses each kind of border.

    Attributes:
        between_processes: what destination ranks need and their own processes do not hold.
        between_nodes: what destination nodes need and do not hold, once for each node.
    """

    between_processes: int
    between_nodes: int


class _Grid:
    """One tensor, cut along every boundary of its shards."""

    def __init__(self, shards: Sequence[TensorShard]) -> None:
        axes = range(len(shards[0].box.shape))
        self._cuts = [sorted({at for s in shards for at in _ends(s, axis)}) for axis in axes]
        self._sizes = np.ones((), dtype=np.int64)
        for cuts in self._cuts:
            lengths = np.array([stop - start for start, stop in pairwise(cuts)], dtype=np.int64)
            self._sizes = np.multiply.outer(self._sizes, lengths)

    def cover(self, shards: Iterable[TensorShard]) -> Any:
        """Mask of the cells that lie in any of the shards."""
        mask = np.zeros(self._sizes.shape, dtype=bool)
        for shard in shards:
            places = (
                slice(*(cuts.index(end) for end in _ends(shard, axis)))
                for axis, cuts in enumerate(self._cuts)
            )
            mask[tuple(places)] = True
        return mask

    def count(self, mask: Any) -> int:
        """Elements in a mask."""
        return int(self._sizes[mask].sum())


def count_least_bytes(sources: Sequence[Endpoint], destinations: Sequence[Endpoint]) -> LeastBytes:
    """Count what has to move, element by element.

    A process that holds an element needs it from nobody; another one gets it once, and a node that
    holds it nowhere gets it across the network once. An element travels in the narrower of the two
    dtypes.
    """
    given, taken = _by_tensor(sources), _by_tensor(destinations)
    processes = nodes = 0
    for key, takers in taken.items():
        holders = given[key]
        shards = [shard for _, shard in (*holders, *takers)]
        grid = _Grid(shards)
        item_bytes = min(_ITEM_BYTES[shard.dtype] for shard in shards)
        by_rank: dict[str, list[TensorShard]] = {}
        for taker, shard in takers:
            by_rank.setdefault(taker.label, []).append(shard)
        for label, wanted in by_rank.items():
            place = next(_process(taker) for taker, _ in takers if taker.label == label)
            held = grid.cover(s for holder, s in holders if _process(holder) == place)
            processes += item_bytes * grid.count(grid.cover(wanted) & ~held)
        for node in {taker.node_id for taker, _ in takers}:
            wanted = grid.cover(s for taker, s in takers if taker.node_id == node)
            held = grid.cover(s for holder, s in holders if holder.node_id == node)
            nodes += item_bytes * grid.count(wanted & ~held)
    return LeastBytes(processes, nodes)


def _by_tensor(endpoints: Sequence[Endpoint]) -> Mapping[str, list[tuple[Endpoint, TensorShard]]]:
    found: dict[str, list[tuple[Endpoint, TensorShard]]] = {}
    for endpoint in endpoints:
        for shard in endpoint.shards:
            found.setdefault(shard.key, []).append((endpoint, shard))
    return found


def _process(endpoint: Endpoint) -> tuple[str, int]:
    return endpoint.node_id, endpoint.process_id


def _ends(shard: TensorShard, axis: int) -> tuple[int, int]:
    start = shard.box.offset[axis]
    return start, start + shard.box.shape[axis]
