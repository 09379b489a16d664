"""Rows that keep their identity: ids, batches of rows, and the join of several inputs.

A batch holds one list of values per column, one value per row. Tensors are stacked only when a
module's method is called (`collate`), so rows of different lengths need no padding on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pickle import PicklingError
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from chatlearn.data.copying import copy_tensor, copy_value
from chatlearn.data.packing import pack_column, unpack_column
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NamedInput", "RowBatch", "RowId", "is_same_content", "join_inputs"]

_SHOWN = 5


class RowId(NamedTuple):
    """Identity of one sample, unique within a run (or within one evaluation).

    `prompt` counts the prompts drawn since the start of the run (in evaluation: the index in
    the data set); `sample` counts the samples of that prompt.
    """

    prompt: int
    sample: int

    def __str__(self) -> str:
        return f"{self.prompt}.{self.sample}"


@dataclass(frozen=True)
class RowBatch:
    """Rows in a given order: `columns[key][i]` belongs to `row_ids[i]`."""

    row_ids: tuple[RowId, ...]
    columns: Mapping[str, list[Any]]

    def __len__(self) -> int:
        return len(self.row_ids)

    def __reduce__(self) -> tuple[Callable[..., RowBatch], tuple[Any, ...]]:
        packed = {key: pack_column(values) for key, values in self.columns.items()}
        return (_rebuild_batch, (self.row_ids, packed))

    @classmethod
    def from_rows(cls, row_ids: Sequence[RowId], rows: Sequence[Mapping[str, Any]]) -> RowBatch:
        """Build from one mapping per row.

        Raises:
            DataError: a row is no mapping, rows have different keys, an id occurs twice, or
                there are not as many rows as ids.
        """
        if len(row_ids) != len(rows):
            raise DataError(f"got {len(rows)} rows for {len(row_ids)} row ids")
        _check_single(row_ids)
        columns: dict[str, list[Any]] | None = None
        for row_id, row in zip(row_ids, rows, strict=True):
            if not isinstance(row, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise DataError(
                    f"row {row_id} is a {type(row).__name__}; expected a mapping of column names "
                    "to values (build_dataset makes such rows)"
                )
            if columns is None:
                columns = {key: [] for key in row}
            if row.keys() != columns.keys():
                raise DataError(
                    f"row {row_id} has the keys {sorted(map(str, row))}; the rows before it have "
                    f"{sorted(columns)}: give every row the same keys"
                )
            for key, value in row.items():
                columns[key].append(value)
        return cls(tuple(row_ids), columns or {})

    @classmethod
    def from_output(cls, row_ids: Sequence[RowId], output: Any, producer: str) -> RowBatch:
        """Cut a method's output (values with a leading batch axis) into rows of their own.

        Nothing is shared with the output: the module may go on changing what it gave, such as a
        buffer that it uses again, or its weights.

        Raises:
            DataError: not a mapping of str to tensors or sequences, a column whose length is not
                the number of rows, or one that holds something that cannot be copied; names
                `producer` and the column.
        """
        if not isinstance(output, Mapping):
            raise DataError(
                f"{producer} gave {type(output).__name__}; expected a dict of column names to "
                "tensors or lists with one entry per row"
            )
        columns: dict[str, list[Any]] = {}
        for key, value in cast("Mapping[Any, Any]", output).items():
            if not isinstance(key, str):
                raise DataError(f"{producer} gave the key {key!r}; expected column names as str")
            columns[key] = _cut_column(value, len(row_ids), f"{producer}: column {key!r}")
        return cls(tuple(row_ids), columns)

    def collate(self) -> dict[str, Any]:
        """The dict that a module's method gets: tensors stacked where shapes and dtypes agree.

        Columns whose values are tensors of one shape and dtype become [rows, ...] tensors;
        every other column stays a list.
        """
        return {key: _stack(values, f"column {key!r}") for key, values in self.columns.items()}

    def select(self, row_ids: Sequence[RowId]) -> RowBatch:
        """The given rows in the given order.

        Raises:
            DataError: some of them are not here.
        """
        if tuple(row_ids) == self.row_ids:
            return self
        position = {row_id: at for at, row_id in enumerate(self.row_ids)}
        missing = [row_id for row_id in row_ids if row_id not in position]
        if missing:
            raise DataError(f"{len(missing)} rows are missing: {_list_rows(missing)}")
        order = [position[row_id] for row_id in row_ids]
        columns = {key: [values[at] for at in order] for key, values in self.columns.items()}
        return RowBatch(tuple(row_ids), columns)

    @classmethod
    def concat(cls, batches: Iterable[RowBatch]) -> RowBatch:
        """Batches with the same columns, one after another.

        Raises:
            DataError: no batch, different columns, or a row that occurs twice.
        """
        parts = list(batches)
        if not parts:
            raise DataError("there are no batches to put together")
        keys = parts[0].columns.keys()
        for part in parts:
            if part.columns.keys() != keys:
                raise DataError(
                    f"batches have different columns: {sorted(keys)} and {sorted(part.columns)}: "
                    "give every row the same columns"
                )
        row_ids = tuple(row_id for part in parts for row_id in part.row_ids)
        _check_single(row_ids)
        if len(parts) == 1:
            return parts[0]
        columns = {key: [value for part in parts for value in part.columns[key]] for key in keys}
        return cls(row_ids, columns)

    def to_rows(self) -> list[dict[str, Any]]:
        """One dict per row, in order."""
        return [
            {key: values[at] for key, values in self.columns.items()} for at in range(len(self))
        ]


@dataclass(frozen=True)
class NamedInput:
    """One input of a call: who produced it, and its rows."""

    producer: str
    batch: RowBatch


def join_inputs(row_ids: Sequence[RowId], inputs: Sequence[NamedInput]) -> RowBatch:
    """Merge the inputs of one call into one batch with rows `row_ids`, joined by row id.

    Raises:
        DataError: an input lacks a row, or two inputs share a key with different content; names
            both producers, the key and the first row that differs.
    """
    columns: dict[str, list[Any]] = {}
    owner: dict[str, str] = {}
    for source in inputs:
        try:
            chosen = source.batch.select(row_ids)
        except DataError as error:
            raise DataError(f"input from {source.producer}: {error}") from error
        for key, values in chosen.columns.items():
            if key in columns:
                _check_same(key, row_ids, columns[key], values, (owner[key], source.producer))
            else:
                columns[key], owner[key] = values, source.producer
    return RowBatch(tuple(row_ids), columns)


def _rebuild_batch(row_ids: tuple[RowId, ...], packed: Mapping[str, Any]) -> RowBatch:
    return RowBatch(row_ids, {key: unpack_column(column) for key, column in packed.items()})


def _check_single(row_ids: Sequence[RowId]) -> None:
    if len(set(row_ids)) == len(row_ids):
        return
    doubled = [row_id for row_id, count in Counter(row_ids).items() if count > 1]
    raise DataError(f"rows occur twice: {_list_rows(doubled)}")


def _check_same(
    key: str,
    row_ids: Sequence[RowId],
    first: list[Any],
    second: list[Any],
    producers: tuple[str, str],
) -> None:
    for row_id, one, other in zip(row_ids, first, second, strict=True):
        if one is not other and not is_same_content(one, other):
            raise DataError(
                f"{producers[0]} and {producers[1]} both give the key {key!r}, with different "
                f"content (first at row {row_id}): rename it in one of them"
            )


def is_same_content(one: Any, other: Any) -> bool:
    """Equal content: tensors and arrays by dtype, shape and value, NaN equal to NaN."""
    import numpy as np
    import torch

    for kind, is_equal in ((torch.Tensor, _is_same_tensor), (np.ndarray, _is_same_array)):
        if isinstance(one, kind) or isinstance(other, kind):
            return isinstance(one, kind) and isinstance(other, kind) and is_equal(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        left, right = cast("Mapping[Any, Any]", one), cast("Mapping[Any, Any]", other)
        return left.keys() == right.keys() and all(
            is_same_content(left[key], right[key]) for key in left
        )
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        entries, others = cast("Sequence[Any]", one), cast("Sequence[Any]", other)
        if type(entries) is not type(others) or len(entries) != len(others):
            return False
        return all(is_same_content(a, b) for a, b in zip(entries, others, strict=True))
    return bool(one == other) or bool(one != one and other != other)


def _is_same_tensor(one: Any, other: Any) -> bool:
    import torch

    if one.dtype != other.dtype or one.shape != other.shape or one.device != other.device:
        return False
    if one.is_floating_point() or one.is_complex():
        return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    return torch.equal(one, other)


def _is_same_array(one: Any, other: Any) -> bool:
    import numpy as np

    return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc")


def _cut_column(value: Any, num_rows: int, what: str) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        length = value.shape[0] if value.dim() else 0
        if value.dim() == 0 or length != num_rows:
            raise DataError(
                f"{what} is a tensor of shape {tuple(value.shape)}; expected a first axis of "
                f"{num_rows}, one entry per row"
            )
        return list(copy_tensor(value).unbind(0))
    is_scalar = not hasattr(value, "__len__") or getattr(value, "shape", None) == ()
    if is_scalar or isinstance(value, str | bytes | Mapping | Set):
        raise DataError(
            f"{what} is a {type(cast('object', value)).__name__}; expected a tensor or a list "
            f"with {num_rows} entries, one per row"
        )
    if len(value) != num_rows:
        raise DataError(f"{what} has {len(value)} entries; expected {num_rows}, one per row")
    return _copy_entries(value, what)


def _stack(values: list[Any], what: str) -> Any:
    import torch

    if values and all(isinstance(value, torch.Tensor) for value in values):
        first = values[0]
        if all(value.shape == first.shape and value.dtype == first.dtype for value in values):
            return torch.stack(values)
    return _copy_entries(values, what)


def _copy_entries(values: Iterable[Any], what: str) -> list[Any]:
    try:
        return [copy_value(value) for value in values]
    except (TypeError, AttributeError, PicklingError) as error:
        raise DataError(
            f"{what} holds what cannot be copied or sent to another process: {error}; give "
            "tensors, arrays, numbers, texts, or lists, tuples and dicts of them"
        ) from error


def _list_rows(row_ids: Sequence[RowId]) -> str:
    shown = ", ".join(map(str, row_ids[:_SHOWN]))
    return shown + (f" and {len(row_ids) - _SHOWN} more" if len(row_ids) > _SHOWN else "")
