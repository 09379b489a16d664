"""Data sets that live in the first model's worker, and rows drawn from them.

The prompts pass through the driver once, when the data sets are built; afterwards the driver
only names rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.data.rows import RowId
from chatlearn.engine.worker_calls import DatasetSizes, RowRequest, build_datasets, load_rows
from chatlearn.flow.execute import RowSource

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatlearn.engine.session import Session
    from chatlearn.runtime.contract import PendingCall, WorkerGroup

__all__ = ["PromptSource"]

_ROWS_PER_LOAD = 64


class PromptSource:
    """The rows of one flow's data sets.

    Args:
        session: the run.
        model_name: the flow's first model, whose `build_dataset` makes the data sets.
        key: tells the data sets of one worker apart (`train`, `eval`).
        prompts: the user's data sets.
        is_eval: passed on to `build_dataset`.

    Attributes:
        lengths: prompts of each data set.
        num_dropped: prompts that the module left out.
    """

    def __init__(
        self,
        session: Session,
        model_name: str,
        key: str,
        prompts: Sequence[Sequence[Any]],
        is_eval: bool,
    ) -> None:
        self._session = session
        self._group = session.groups[model_name][0]
        self._key = key
        # By index: a torch Dataset need not end by itself when it is iterated over.
        self._parts = [[part[at] for at in range(len(part))] for part in prompts]
        self._is_eval = is_eval
        sizes = self._build()
        self.lengths = sizes.lengths
        self.num_dropped = sizes.num_dropped
        session.on_restart.append(self._build_again)

    def load(
        self,
        requests: Sequence[RowRequest],
        on_row: Callable[[RowId, tuple[RowSource, ...]], None] | None = None,
    ) -> dict[RowId, tuple[RowSource, ...]]:
        """Start reading rows; gives at once where each of them will lie, in order.

        Args:
            requests: the rows.
            on_row: called with each row, its tokens counted, once it has been read.
        """
        rows: dict[RowId, tuple[RowSource, ...]] = {}
        for start in range(0, len(requests), _ROWS_PER_LOAD):
            chunk = tuple(requests[start : start + _ROWS_PER_LOAD])
            calls = self._group.call(load_rows, self._key, chunk, ranks=(0,), num_outputs=2)
            row_ids = [request.row_id for request in chunk]

            def finish(call: PendingCall = calls[0], row_ids: list[RowId] = row_ids) -> None:
                if on_row is not None:
                    for row_id, source in self._measure(call, row_ids).items():
                        on_row(row_id, (source,))

            self._session.loop.submit(calls, finish, "reading the data set")
            rows.update(dict.fromkeys(row_ids, (RowSource("batch", calls[0].outputs[0]),)))
        return rows

    def _build(self) -> DatasetSizes:
        name = self._group.model_name
        calls = self._group.call(build_datasets, self._key, self._parts, self._is_eval, ranks=(0,))
        found = self._session.collect({name: list(calls)}, f"{name}.build_dataset")
        return found[name][0]

    def _build_again(self, group: WorkerGroup) -> None:
        if group is self._group:
            self._build()

    def _measure(self, call: PendingCall, row_ids: Sequence[RowId]) -> dict[RowId, RowSource]:
        timeout_s = self._session.loop.stage_timeout_s
        loads = self._session.backend.fetch(call, timeout_s, output=1)
        return RowSource.of_rows("batch", call.outputs[0], row_ids, loads)

    def load_everything(self) -> dict[RowId, tuple[RowSource, ...]]:
        """Every row of every data set once, in order; row ids count from 0."""
        pairs = [
            (dataset, index)
            for dataset, length in enumerate(self.lengths)
            for index in range(length)
        ]
        return self.load(
            [
                RowRequest(dataset, index, RowId(number, 0))
                for number, (dataset, index) in enumerate(pairs)
            ]
        )
