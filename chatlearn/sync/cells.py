"""From the shards of many ranks to the distinct boxes of each tensor and who holds them. Pure.

What depends on the shards only is done once for every group of ranks that hold the same, so the
cost follows the size of the model, not the number of data-parallel ranks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from math import prod

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.records import ITEM_BYTES, Cell, Endpoint

__all__ = ["BoxIndex", "CellTable"]

_NAMED_RANKS = 6


class BoxIndex:
    """Finds the boxes of one tensor that share elements with a given one.

    Axes on which every box has length 1 (layers, experts) become a dictionary key; along the
    rest the boxes are sorted by their start on the axis that is cut most.

    Args:
        boxes: of one tensor.
    """

    def __init__(self, boxes: Sequence[Box]) -> None:
        rank = len(boxes[0].shape) if boxes else 0
        self._unit_axes = tuple(a for a in range(rank) if all(b.shape[a] == 1 for b in boxes))
        rest = [a for a in range(rank) if a not in self._unit_axes]
        self._axis = max(rest, key=lambda a: len({b.offset[a] for b in boxes}), default=None)
        self._boxes = boxes
        self._places: dict[tuple[int, ...], list[int]] = {}
        for number, box in enumerate(boxes):
            place = tuple(box.offset[a] for a in self._unit_axes)
            self._places.setdefault(place, []).append(number)
        self._starts: dict[tuple[int, ...], list[int]] = {}
        self._longest = 1
        axis = self._axis
        if axis is not None:
            self._longest = max(box.shape[axis] for box in boxes)
            for place, numbers in self._places.items():
                numbers.sort(key=lambda n: boxes[n].offset[axis])
                self._starts[place] = [boxes[n].offset[axis] for n in numbers]

    def overlapping(self, box: Box) -> Iterator[tuple[int, Box]]:
        """Number and common part of every box that shares elements with `box`."""
        for place in self._reached(box):
            for number in self._near(place, box):
                common = self._boxes[number].intersect(box)
                if common is not None:
                    yield number, common

    def find_overlap(self) -> tuple[Box, Box] | None:
        """Two of the boxes that share elements, if there are any."""
        for number, box in enumerate(self._boxes):
            for other, _ in self.overlapping(box):
                if other != number:
                    return self._boxes[min(number, other)], self._boxes[max(number, other)]
        return None

    def _reached(self, box: Box) -> Iterable[tuple[int, ...]]:
        count = prod(box.shape[a] for a in self._unit_axes)
        if count > len(self._places):
            return [p for p in self._places if self._holds(box, p)]
        spans = (range(box.offset[a], box.offset[a] + box.shape[a]) for a in self._unit_axes)
        return (place for place in product(*spans) if place in self._places)

    def _holds(self, box: Box, place: tuple[int, ...]) -> bool:
        return all(
            box.offset[a] <= at < box.offset[a] + box.shape[a]
            for a, at in zip(self._unit_axes, place, strict=True)
        )

    def _near(self, place: tuple[int, ...], box: Box) -> Sequence[int]:
        numbers = self._places[place]
        if self._axis is None:
            return numbers
        starts, begin = self._starts[place], box.offset[self._axis]
        first = bisect_left(starts, begin - self._longest + 1)
        return numbers[first : bisect_left(starts, begin + box.shape[self._axis])]


class CellTable:
    """The cells of one side of a sync, by tensor.

    Args:
        endpoints: the ranks of one side.
        first_index: index of the first of them among the plan's endpoints.
        first_group: number of the first group.

    Raises:
        SyncError: there are no ranks, a box is no part of its tensor, ranks disagree on a
            tensor's shape or dtype, or a copy of the model (all ranks of a source, each replica
            of a destination) has a hole or an overlap; names tensor and ranks.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], first_index: int = 0, first_group: int = 0
    ) -> None:
        if not endpoints:
            side = "destination" if first_index else "source"
            raise SyncError(f"the {side} of a sync has no ranks: give at least one")
        self.model_name = endpoints[0].model_name
        self._endpoints = endpoints
        self._first_index = first_index
        self.first_group = first_group
        self.groups, self._members = _group_equal(endpoints, first_group)
        self._labels = {g: [endpoints[i].label for i in m] for g, m in self._members.items()}
        self.by_key: dict[str, tuple[Cell, ...]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._holders: dict[tuple[int, ...], tuple[int, ...]] = {}
        found: dict[str, dict[Box, dict[int, TensorShard]]] = {}
        checked: set[int] = set()
        for group, members in self._members.items():
            # Groups share shards: each is looked at once.
            for shard in endpoints[members[0]].shards:
                if id(shard) not in checked:
                    checked.add(id(shard))
                    _check_place(shard, self._labels[group])
            _check_local(endpoints[members[0]])
            for shard in endpoints[members[0]].shards:
                held = found.setdefault(shard.key, {}).setdefault(shard.box, {})
                if held.setdefault(group, shard) is not shard:
                    raise SyncError(
                        f"{shard.key}: {endpoints[members[0]].label} holds one box of it twice, in "
                        f"{held[group].local_name} and {shard.local_name}: describe it once"
                    )
        for key, boxes in found.items():
            self._add(key, boxes)
        self._check_copies()

    def labels(self, key: str) -> str:
        """The ranks that hold a part of a tensor, as messages name them."""
        return self._name_ranks(group for cell in self.by_key[key] for group in cell.shards)

    def _name_ranks(self, groups: Iterable[int]) -> str:
        return _name([name for group in dict.fromkeys(groups) for name in self._labels[group]])

    def _add(self, key: str, boxes: Mapping[Box, Mapping[int, TensorShard]]) -> None:
        shards = [shard for held in boxes.values() for shard in held.values()]
        kinds = {(shard.global_shape, shard.dtype) for shard in shards}
        if len(kinds) > 1:
            ranks = self._name_ranks(group for held in boxes.values() for group in held)
            raise SyncError(f"{key}: its ranks ({ranks}) disagree on shape or dtype: {kinds}")
        ((shape, dtype),) = kinds
        if dtype not in ITEM_BYTES:
            ranks = self._name_ranks(group for held in boxes.values() for group in held)
            raise SyncError(f"{key} of {ranks} has the dtype {dtype}, which a sync cannot move")
        self.shapes[key] = shape
        self.by_key[key] = tuple(
            Cell(key, box, dtype, self._held_by(tuple(held)), held) for box, held in boxes.items()
        )

    def _held_by(self, groups: tuple[int, ...]) -> tuple[int, ...]:
        if groups not in self._holders:
            members = (m + self._first_index for g in groups for m in self._members[g])
            self._holders[groups] = tuple(sorted(members))
        return self._holders[groups]

    def _check_copies(self) -> None:
        """Every copy must partition every tensor; equal sets of groups are checked once."""
        copies: dict[tuple[str, int], set[int]] = {}
        for endpoint, group in zip(self._endpoints, self.groups, strict=True):
            copies.setdefault((endpoint.model_name, endpoint.replica), set()).add(group)
        for groups in dict.fromkeys(frozenset(found) for found in copies.values()):
            is_all = len(groups) == len(self._members)
            for key, cells in self.by_key.items():
                own = cells if is_all else [c for c in cells if not groups.isdisjoint(c.shards)]
                self._check_partition(key, own, groups)

    def _check_partition(self, key: str, cells: Sequence[Cell], groups: frozenset[int]) -> None:
        held, whole = sum(cell.box.num_elements for cell in cells), prod(self.shapes[key])
        holders = [group for cell in cells for group in cell.shards if group in groups]
        if held != whole:
            kind = "a hole" if held < whole else "an overlap"
            ranks = self._name_ranks(holders or sorted(groups))
            raise SyncError(
                f"{key}: the shards of {ranks} leave {kind}: {held} of {whole} elements"
            )
        pair = BoxIndex([cell.box for cell in cells]).find_overlap()
        if pair is not None:
            both = (g for c in cells if c.box in pair for g in c.shards if g in groups)
            raise SyncError(
                f"{key}: the shards of {self._name_ranks(both)} overlap, and so those of "
                f"{self._name_ranks(holders)} leave a hole"
            )


def _group_equal(
    endpoints: Sequence[Endpoint], first: int
) -> tuple[tuple[int, ...], dict[int, list[int]]]:
    """The group of each endpoint, and the endpoints of each group."""
    by_identity: dict[int, int] = {}
    by_value: dict[tuple[TensorShard, ...], int] = {}
    members: dict[int, list[int]] = {}
    groups: list[int] = []
    for number, endpoint in enumerate(endpoints):
        group = by_identity.get(id(endpoint.shards))
        if group is None:
            group = by_value.setdefault(endpoint.shards, first + len(by_value))
            by_identity[id(endpoint.shards)] = group
        members.setdefault(group, []).append(number)
        groups.append(group)
    return tuple(groups), members


def _check_place(shard: TensorShard, labels: Sequence[str]) -> None:
    """A shard's box lies within its tensor, and has a place in the local one."""
    shape, box, local = shard.global_shape, shard.box, shard.local_offset
    if not len(shape) == len(box.offset) == len(box.shape):
        fault = "offset, shape and tensor must have the same number of axes"
    elif any(
        at < 0 or length < 0 or at + length > whole
        for at, length, whole in zip(box.offset, box.shape, shape, strict=True)
    ):
        fault = "a box must lie within its tensor"
    elif len(local) > len(shape) or any(at < 0 for at in local):
        fault = "the local offset must have no more axes than the tensor, and nothing below 0"
    elif any(length != 1 for length in box.shape[: len(shape) - len(local)]):
        fault = "axes that the local tensor lacks must have length 1 in the box"
    else:
        return
    raise SyncError(
        f"{shard.key}: {_name(labels)} told a box at {box.offset} of shape {box.shape} in a tensor "
        f"of shape {shape}, at {local} of the local tensor {shard.local_name}: {fault}"
    )


def _name(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _NAMED_RANKS} more" if len(labels) > _NAMED_RANKS else ""
    return ", ".join(labels[:_NAMED_RANKS]) + more


def _check_local(endpoint: Endpoint) -> None:
    """No element of a local tensor may belong to two shards."""
    regions: dict[str, list[TensorShard]] = {}
    for shard in endpoint.shards:
        regions.setdefault(shard.local_name, []).append(shard)
    for name, shards in regions.items():
        if len(shards) == 1:
            continue
        if len({len(shard.local_offset) for shard in shards}) > 1:
            keys = sorted({shard.key for shard in shards})
            raise SyncError(
                f"{', '.join(keys)}: {endpoint.label} describes its tensor {name} with different "
                "numbers of axes: a local tensor has one shape"
            )
        boxes = [Box(shard.local_offset, shard.local_shape) for shard in shards]
        pair = BoxIndex(boxes).find_overlap()
        if pair is not None:
            keys = sorted({s.key for s, b in zip(shards, boxes, strict=True) if b in pair})
            raise SyncError(
                f"{', '.join(keys)}: {endpoint.label} describes one part of its tensor {name} "
                "twice: its shards overlap in memory"
            )
