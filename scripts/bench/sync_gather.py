"""What others do: gather each full parameter on one rank, broadcast it to every destination. Pure.

The plan only; `scripts.bench.sync_baselines` carries it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from chatlearn.parallel.sharding import Box

if TYPE_CHECKING:
    from chatlearn.parallel.sharding import TensorShard
    from chatlearn.sync.records import Endpoint

__all__ = ["FullParameter", "is_whole", "plan_gather_broadcast", "region_in_full"]


@dataclass(frozen=True)
class FullParameter:
    """One parameter of one layer.

    Attributes:
        shape: of the whole parameter.
        dtype: torch's name without the prefix.
        owner: index of the source that gathers it.
        parts: for each source that contributes, the shards that it does.
        takers: for each destination, the shards that it keeps.
    """

    shape: tuple[int, ...]
    dtype: str
    owner: int
    parts: Mapping[int, tuple[TensorShard, ...]]
    takers: Mapping[int, tuple[TensorShard, ...]]

    @property
    def num_elements(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)


def plan_gather_broadcast(
    endpoints: Sequence[Endpoint], num_sources: int
) -> tuple[FullParameter, ...]:
    """Every parameter, with the first source that holds a part of it as its owner."""
    given: dict[tuple[str, tuple[int, ...]], dict[int, list[TensorShard]]] = {}
    taken: dict[tuple[str, tuple[int, ...]], dict[int, list[TensorShard]]] = {}
    known: set[tuple[str, Box]] = set()
    for index, endpoint in enumerate(endpoints):
        for shard in endpoint.shards:
            place = shard.key, shard.box.offset[: _num_lead(shard)]
            if index >= num_sources:
                taken.setdefault(place, {}).setdefault(index, []).append(shard)
            elif (shard.key, shard.box) not in known:
                known.add((shard.key, shard.box))
                given.setdefault(place, {}).setdefault(index, []).append(shard)
    found: list[FullParameter] = []
    for place, takers in taken.items():
        parts = given[place]
        owner = min(parts)
        shard = parts[owner][0]
        found.append(
            FullParameter(
                shard.global_shape[_num_lead(shard) :],
                shard.dtype,
                owner,
                {at: tuple(shards) for at, shards in parts.items()},
                {at: tuple(shards) for at, shards in takers.items()},
            )
        )
    return tuple(found)


def region_in_full(shard: TensorShard) -> tuple[slice, ...]:
    """Where a shard lies in its full parameter."""
    lead = _num_lead(shard)
    pairs = zip(shard.box.offset[lead:], shard.box.shape[lead:], strict=True)
    return tuple(slice(start, start + length) for start, length in pairs)


def is_whole(shards: Sequence[TensorShard], num_elements: int) -> bool:
    """Whether the local tensor of these shards is the full parameter itself."""
    return (
        len({shard.local_name for shard in shards}) == 1
        and sum(shard.box.num_elements for shard in shards) == num_elements
        and all(shard.local_offset == shard.box.offset[_num_lead(shard) :] for shard in shards)
    )


def _num_lead(shard: TensorShard) -> int:
    """Leading axes, of layers say, that the parameter itself does not have."""
    return len(shard.box.shape) - len(shard.local_offset)
