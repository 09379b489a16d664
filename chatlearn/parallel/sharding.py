"""Descriptions of sharded tensors and the algebra of their boxes, in global index space.

Pure: no torch. One description serves every layout: a tensor has a global key and shape, and a
shard is a box of it that lies in a region of some local tensor.
"""

from dataclasses import dataclass
from math import prod

__all__ = ["Box", "TensorShard"]


@dataclass(frozen=True)
class Box:
    """An axis-aligned box of a global tensor: `offset` and `shape` have one entry per axis."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements in the box."""
        return prod(self.shape)

    def intersect(self, other: "Box") -> "Box | None":
        """The common part of two boxes, or None where they share no element."""
        starts = tuple(map(max, self.offset, other.offset))
        stops = tuple(
            min(a + n, b + m)
            for a, n, b, m in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )
        shape = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        return Box(starts, shape) if all(n > 0 for n in shape) else None


@dataclass(frozen=True)
class TensorShard:
    """One box of a global tensor, and where it lies in a local tensor of one rank.

    Attributes:
        key: the tensor's global name, the same on every rank and in every layout.
        global_shape: shape of the whole tensor (stacked layers or experts lead as axes).
        box: the part held here.
        dtype: torch's name without the prefix, such as `float32` or `bfloat16`.
        local_name: name of the local tensor (a parameter's name in the module).
        local_offset: where the box starts in the local tensor. The local tensor has the box's
            last `len(local_offset)` axes; the axes before them have length 1 in the box.
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    dtype: str
    local_name: str
    local_offset: tuple[int, ...]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the region within the local tensor."""
        return self.box.shape[len(self.box.shape) - len(self.local_offset) :]

    def local_slices(self, box: Box | None = None) -> tuple[slice, ...]:
        """Slices into the local tensor for `box` (a part of this shard's box; default all)."""
        part = box or self.box
        lead = len(self.box.shape) - len(self.local_offset)
        begins = tuple(
            at + part.offset[lead + axis] - self.box.offset[lead + axis]
            for axis, at in enumerate(self.local_offset)
        )
        return tuple(
            slice(begin, begin + part.shape[lead + axis]) for axis, begin in enumerate(begins)
        )
