"""Data sets that live in the first model's worker, and rows drawn from them.

The prompts pass through the driver once, when the data sets are built; afterwards the driver
only names rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.data.rows import RowId
from chatlearn.engine.worker_calls import RowRequest, build_datasets, load_rows
from chatlearn.flow.execute import RowSource

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.engine.session import Session

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
        parts = [[part[at] for at in range(len(part))] for part in prompts]
        calls = self._group.call(build_datasets, key, parts, is_eval, ranks=(0,))
        found = session.collect({model_name: list(calls)}, f"{model_name}.build_dataset")
        self.lengths: tuple[int, ...] = found[model_name][0]

    def load(self, requests: Sequence[RowRequest]) -> dict[RowId, tuple[RowSource, ...]]:
        """Start reading rows; gives at once where each of them will lie, in order."""
        rows: dict[RowId, tuple[RowSource, ...]] = {}
        for start in range(0, len(requests), _ROWS_PER_LOAD):
            chunk = tuple(requests[start : start + _ROWS_PER_LOAD])
            calls = self._group.call(load_rows, self._key, chunk, ranks=(0,), num_outputs=2)
            self._session.loop.submit(calls, lambda: None, "reading the data set")
            source = (RowSource("batch", calls[0].outputs[0]),)
            rows.update({request.row_id: source for request in chunk})
        return rows

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
