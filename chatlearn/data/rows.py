"""Rows that keep their identity: ids, batches of rows, and the join of several inputs.

A batch holds one list of values per column, one value per row. Tensors are stacked only when a
module's method is called (`collate`), so rows of different lengths need no padding on the way.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["NamedInput", "RowBatch", "RowId", "join_inputs"]


class RowId(NamedTuple):
    """Identity of one sample, unique within a run (or within one evaluation).

    `prompt` counts the prompts drawn since the start of the run (in evaluation: the index in
    the data set); `sample` counts the samples of that prompt.
    """

    prompt: int
    sample: int


@dataclass(frozen=True)
class RowBatch:
    """Rows in a given order: `columns[key][i]` belongs to `row_ids[i]`."""

    row_ids: tuple[RowId, ...]
    columns: Mapping[str, list[Any]]

    def __len__(self) -> int:
        return len(self.row_ids)

    @classmethod
    def from_rows(cls, row_ids: Sequence[RowId], rows: Sequence[Mapping[str, Any]]) -> "RowBatch":
        """Build from one mapping per row; all rows have the same keys (DataError otherwise)."""
        raise NotImplementedError

    @classmethod
    def from_output(
        cls, row_ids: Sequence[RowId], output: Mapping[str, Any], producer: str
    ) -> "RowBatch":
        """Cut a method's output (values with a leading batch axis) into rows.

        Raises:
            DataError: not a mapping of str to tensors or sequences, or a column whose length is
                not the number of rows; names `producer` and the column.
        """
        raise NotImplementedError

    def collate(self) -> dict[str, Any]:
        """The dict that a module's method gets: tensors stacked where shapes and dtypes agree.

        Columns whose values are tensors of one shape and dtype become [rows, ...] tensors;
        every other column stays a list.
        """
        raise NotImplementedError

    def select(self, row_ids: Sequence[RowId]) -> "RowBatch":
        """The given rows in the given order (DataError names rows that are missing)."""
        raise NotImplementedError

    @classmethod
    def concat(cls, batches: Iterable["RowBatch"]) -> "RowBatch":
        """Batches with the same columns, one after another (DataError on a doubled row)."""
        raise NotImplementedError

    def to_rows(self) -> list[dict[str, Any]]:
        """One dict per row, in order."""
        raise NotImplementedError


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
    raise NotImplementedError
