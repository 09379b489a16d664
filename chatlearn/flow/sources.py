"""Where the rows of a running flow lie: the raw batch, and what each node has made of it.

Driver side; only row ids, handles and numbers of tokens are here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.data.balance import RowLoad, merge_loads
from chatlearn.flow.graph import ROOT
from chatlearn.flow.stage import StageInput

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chatlearn.data.rows import RowId
    from chatlearn.flow.graph import FlowNode
    from chatlearn.runtime.contract import RemoteValue

__all__ = ["RowSource", "RowSources"]


@dataclass(frozen=True)
class RowSource:
    """Where a row's values lie.

    Attributes:
        producer: name of what made them.
        batch: handle on the batch that holds them.
        load: tokens of the row in that batch.
    """

    producer: str
    batch: RemoteValue
    load: RowLoad = RowLoad()

    @classmethod
    def of_rows(
        cls,
        producer: str,
        batch: RemoteValue,
        row_ids: Sequence[RowId],
        loads: Sequence[RowLoad],
    ) -> dict[RowId, RowSource]:
        """The rows of one batch; `loads` may be empty."""
        if not loads:
            return dict.fromkeys(row_ids, cls(producer, batch))
        pairs = zip(row_ids, loads, strict=True)
        return {row_id: cls(producer, batch, load) for row_id, load in pairs}


class RowSources:
    """Where a flow's rows lie.

    Args:
        rows: the raw batch: for each row, in order, where its values lie.
        num_nodes: nodes of the flow.

    Attributes:
        made: by node, what it has made.
    """

    def __init__(self, rows: Mapping[RowId, tuple[RowSource, ...]], num_nodes: int) -> None:
        self._rows = rows
        self.made: list[dict[RowId, RowSource]] = [{} for _ in range(num_nodes)]

    def loads(self, node: FlowNode, row_ids: Sequence[RowId]) -> dict[RowId, RowLoad]:
        """Tokens of a node's inputs, by row."""
        return {
            row_id: merge_loads(source.load for _, source in self._sources_of(node, row_id))
            for row_id in row_ids
        }

    def inputs(self, node: FlowNode, row_ids: Sequence[RowId]) -> tuple[StageInput, ...]:
        """A node's inputs for some rows: for each producer the batches that hold them."""
        batches: dict[tuple[int, str], dict[int, RemoteValue]] = {}
        for row_id in row_ids:
            for index, source in self._sources_of(node, row_id):
                key = (index, source.producer)
                batches.setdefault(key, {})[id(source.batch)] = source.batch
        return tuple(
            StageInput(producer, tuple(batches[index, producer].values()))
            for index, producer in sorted(batches, key=lambda key: node.inputs.index(key[0]))
        )

    def _sources_of(self, node: FlowNode, row_id: RowId) -> Iterator[tuple[int, RowSource]]:
        """Where a node's inputs for one row lie, with the index of what made each."""
        for index in dict.fromkeys(node.inputs):
            if index != ROOT:
                yield index, self.made[index][row_id]
                continue
            for source in self._rows[row_id]:
                yield index, source
