"""Columns in a form that pickles fast: one flat tensor instead of one small tensor per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

__all__ = ["PackedColumn", "pack_column", "unpack_column"]


@dataclass(frozen=True)
class PackedColumn:
    """Tensors of one dtype, flattened one after another.

    Attributes:
        flat: [total elements], all rows.
        shapes: shape of each row's tensor.
    """

    flat: torch.Tensor
    shapes: tuple[tuple[int, ...], ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # As an array, which pickle may hand over outside its stream; torch's own way goes through
        # a file format and is ten times slower.
        import torch

        raw: Any = self.flat.contiguous().view(torch.uint8).numpy()
        return (_rebuild_column, (raw, str(self.flat.dtype).removeprefix("torch."), self.shapes))


def _rebuild_column(raw: Any, dtype_name: str, shapes: tuple[tuple[int, ...], ...]) -> PackedColumn:
    import torch

    dtype: torch.dtype = getattr(torch, dtype_name)
    if not raw.size:
        return PackedColumn(torch.empty(0, dtype=dtype), shapes)
    # A copy: the array may lie in read-only memory that others see too.
    flat = cast("Any", torch).from_numpy(raw.copy()).view(dtype)
    return PackedColumn(flat, shapes)


def pack_column(values: list[Any]) -> PackedColumn | list[Any]:
    """One flat tensor where every value is a CPU tensor of one dtype; else the list itself."""
    import torch

    if not values or not all(isinstance(value, torch.Tensor) for value in values):
        return values
    first = values[0]
    if any(value.dtype != first.dtype or value.device.type != "cpu" for value in values):
        return values
    flat = torch.cat([value.detach().reshape(-1) for value in values])
    return PackedColumn(flat, tuple(tuple(value.shape) for value in values))


def unpack_column(column: PackedColumn | list[Any]) -> list[Any]:
    """The inverse of `pack_column`; the tensors are views of one buffer."""
    if not isinstance(column, PackedColumn):
        return column
    import math

    sizes = [math.prod(shape) for shape in column.shapes]
    parts = cast("Any", column.flat).split(sizes)
    return [part.view(shape) for part, shape in zip(parts, column.shapes, strict=True)]
