"""Renamings: the same weights under other names, cut and joined otherwise. Pure: no torch.

A renaming says, box by box, where each part of a tensor in an old naming lies in the new one. The
boxes part every tensor on both sides, so it can be undone by construction.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from math import prod

from chatlearn.errors import SyncError
from chatlearn.parallel.sharding import Box, TensorShard

__all__ = ["Piece", "Region", "Renaming"]


@dataclass(frozen=True)
class Region:
    """A box of a named tensor; `global_shape` is that of the whole tensor."""

    key: str
    global_shape: tuple[int, ...]
    box: Box

    @staticmethod
    def whole(key: str, global_shape: tuple[int, ...]) -> Region:
        """All of a tensor."""
        return Region(key, global_shape, Box((0,) * len(global_shape), global_shape))


@dataclass(frozen=True)
class Piece:
    """Elements that both namings have, in the same order within their two boxes.

    The boxes have one shape, but for leading axes of length 1 that only one of them has (stacked
    layers or experts).
    """

    old: Region
    new: Region


@dataclass(frozen=True)
class Renaming:
    """From an old naming to a new one, piece by piece.

    A rename is one piece that covers both tensors; a slice or a concatenation is one piece for
    each part; a permutation is one piece for each block that stays together. A permutation of
    single elements would need a piece for each: it can be written down but is not what this is
    for. Transposed, reshaped and computed tensors cannot be expressed.

    Raises:
        SyncError: the boxes of a piece differ in shape, or the pieces leave a hole in a tensor or
            overlap there, on either side; names the tensor.
    """

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for piece in self.pieces:
            _check_shapes(piece)
        _ = self._index
        _index_pieces(self.pieces, _new_region)

    @cached_property
    def _index(self) -> dict[str, _Tensor]:
        return _index_pieces(self.pieces, _old_region)

    def inverse(self) -> Renaming:
        """From the new naming to the old one."""
        return Renaming(tuple(Piece(piece.new, piece.old) for piece in self.pieces))

    def apply(self, shards: Sequence[TensorShard]) -> tuple[TensorShard, ...]:
        """Describe the same regions of the same local tensors in the new naming.

        Args:
            shards: in the old naming.

        Returns:
            One shard for each piece that a given one meets; none where it holds no element.

        Raises:
            SyncError: a tensor is unknown here, has another shape, or cannot be described in the
                new naming; names it.
        """
        return tuple(renamed for shard in shards for renamed in self._rename(shard))

    def _rename(self, shard: TensorShard) -> Iterator[TensorShard]:
        tensor = self._index.get(shard.key)
        if tensor is None:
            raise SyncError(
                f"{shard.key}: this renaming knows no such tensor; both models need the same "
                "architecture"
            )
        if tensor.global_shape != shard.global_shape:
            raise SyncError(
                f"{shard.key}: got the shape {shard.global_shape}, this renaming expects "
                f"{tensor.global_shape}: both models need the same architecture"
            )
        num_elements = 0
        for piece in tensor.node.find(shard.box):
            common = piece.old.box.intersect(shard.box)
            if common is not None:
                num_elements += common.num_elements
                yield _translate(shard, piece, common)
        if num_elements != shard.box.num_elements:
            raise SyncError(f"{shard.key}: {shard.box} lies outside its shape {shard.global_shape}")


def _old_region(piece: Piece) -> Region:
    return piece.old


def _new_region(piece: Piece) -> Region:
    return piece.new


_Side = Callable[[Piece], Region]


@dataclass(frozen=True)
class _Leaf:
    """Pieces that no cut along an axis tells apart: one, unless they are interlocked."""

    pieces: tuple[Piece, ...]

    def find(self, box: Box) -> Iterator[Piece]:
        """Those that may meet `box`."""
        del box
        yield from self.pieces


@dataclass(frozen=True)
class _Cut:
    """Groups of pieces that follow each other along an axis."""

    axis: int
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    children: tuple[_Leaf | _Cut, ...]

    def find(self, box: Box) -> Iterator[Piece]:
        """Those that may meet `box`."""
        start = box.offset[self.axis]
        first = bisect_right(self.stops, start)
        last = bisect_left(self.starts, start + box.shape[self.axis])
        for child in self.children[first:last]:
            yield from child.find(box)


@dataclass(frozen=True)
class _Tensor:
    """The pieces of one tensor, for look-up by box."""

    global_shape: tuple[int, ...]
    node: _Leaf | _Cut


def _check_shapes(piece: Piece) -> None:
    old, new = piece.old.box.shape, piece.new.box.shape
    shared = min(len(old), len(new))
    old_lead, new_lead = len(old) - shared, len(new) - shared
    extra = (*old[:old_lead], *new[:new_lead])
    if old[old_lead:] != new[new_lead:] or any(n != 1 for n in extra):
        raise SyncError(
            f"{piece.old.key} and {piece.new.key}: a piece has the shapes {old} and {new}; "
            "expected equal ones, but for leading axes of length 1"
        )


def _index_pieces(pieces: Sequence[Piece], side: _Side) -> dict[str, _Tensor]:
    """The pieces of each tensor of one naming, once it is sure that they part it."""
    by_key: dict[str, list[Piece]] = {}
    for piece in pieces:
        by_key.setdefault(side(piece).key, []).append(piece)
    return {key: _index_tensor(found, side) for key, found in by_key.items()}


def _index_tensor(pieces: list[Piece], side: _Side) -> _Tensor:
    regions = [side(piece) for piece in pieces]
    key, whole = regions[0].key, regions[0].global_shape
    for region in regions:
        if region.global_shape != whole:
            raise SyncError(f"{key}: pieces say it has the shape {whole} and {region.global_shape}")
        _check_inside(region)
    held = sum(region.box.num_elements for region in regions)
    node = _build_node(pieces, side)
    if held != prod(whole):
        raise SyncError(f"{key}: the pieces leave a hole: {held} of {prod(whole)} elements")
    return _Tensor(whole, node)


def _check_inside(region: Region) -> None:
    box, whole = region.box, region.global_shape
    is_inside = len(box.offset) == len(box.shape) == len(whole) and all(
        0 <= start < start + length <= size
        for start, length, size in zip(box.offset, box.shape, whole, strict=True)
    )
    if not is_inside:
        raise SyncError(f"{region.key}: {box} is empty or lies outside the shape {whole}")


def _build_node(pieces: list[Piece], side: _Side) -> _Leaf | _Cut:
    if len(pieces) > 1:
        for axis in range(len(side(pieces[0]).box.shape)):
            groups = _group_along(pieces, side, axis)
            if len(groups) > 1:
                boxes = [[side(piece).box for piece in group] for group in groups]
                return _Cut(
                    axis,
                    tuple(min(box.offset[axis] for box in group) for group in boxes),
                    tuple(max(_stop(box, axis) for box in group) for group in boxes),
                    tuple(_build_node(group, side) for group in groups),
                )
        _check_disjoint(side(piece) for piece in pieces)
    return _Leaf(tuple(pieces))


def _group_along(pieces: Iterable[Piece], side: _Side, axis: int) -> list[list[Piece]]:
    """Groups of pieces between which the tensor can be cut across `axis`, in order."""
    groups: list[list[Piece]] = []
    stop = 0
    for piece in sorted(pieces, key=lambda p: side(p).box.offset[axis]):
        box = side(piece).box
        if not groups or box.offset[axis] >= stop:
            groups.append([])
        groups[-1].append(piece)
        stop = max(stop, _stop(box, axis))
    return groups


def _stop(box: Box, axis: int) -> int:
    return box.offset[axis] + box.shape[axis]


def _check_disjoint(regions: Iterable[Region]) -> None:
    for one, other in combinations(regions, 2):
        common = one.box.intersect(other.box)
        if common is not None:
            raise SyncError(f"{one.key}: two pieces overlap, at {common}")


def _translate(shard: TensorShard, piece: Piece, common: Box) -> TensorShard:
    """The part `common` of a shard, in the words of the new naming."""
    old, new = piece.old.box, piece.new.box
    if len(shard.local_offset) > len(new.shape):
        raise SyncError(
            f"{shard.key}: the local tensor {shard.local_name} has {len(shard.local_offset)} axes "
            f"and {piece.new.key} only {len(new.shape)}: it cannot be described as part of it"
        )
    shared = min(len(old.shape), len(new.shape))
    old_lead, new_lead = len(old.shape) - shared, len(new.shape) - shared
    offset = tuple(
        at - start + new_start
        for at, start, new_start in zip(
            common.offset[old_lead:], old.offset[old_lead:], new.offset[new_lead:], strict=True
        )
    )
    return TensorShard(
        key=piece.new.key,
        global_shape=piece.new.global_shape,
        box=Box(new.offset[:new_lead] + offset, (1,) * new_lead + common.shape[old_lead:]),
        dtype=shard.dtype,
        local_name=shard.local_name,
        local_offset=tuple(part.start for part in shard.local_slices(common)),
    )
