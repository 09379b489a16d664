"""The rows of one flow node: which still lack inputs, which are ready, how they are batched.

Pure; the executor owns one for each node of a running flow.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence

from chatlearn.data.rows import RowId

__all__ = ["NodeQueue"]


class NodeQueue:
    """Hands out batches of rows whose inputs are all there.

    Args:
        row_ids: every row that will pass, in order.
        num_producers: upstream nodes that each row waits for; 0: ready at once.
        batch_size: rows of a batch; the last may be smaller.
        is_deterministic: batches are consecutive runs of the row order, whatever arrives first;
            otherwise rows are batched as they arrive.
        spread: cuts what is ready, a batch or more, by a measure of its own; nothing: it has
            none, and batches are of `batch_size`. Not asked where `is_deterministic`.
    """

    def __init__(
        self,
        row_ids: tuple[RowId, ...],
        num_producers: int,
        batch_size: int,
        is_deterministic: bool,
        spread: Callable[[Sequence[RowId]], Sequence[tuple[RowId, ...]]] | None = None,
    ) -> None:
        if batch_size < 1 and row_ids:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}")
        self._batch_size = batch_size
        self._num_rows = len(row_ids)
        self._missing = dict.fromkeys(row_ids, num_producers)
        self._ready: deque[RowId] = deque()
        self._spread = spread
        self._pieces: deque[tuple[RowId, ...]] = deque()
        self._chunks: deque[tuple[RowId, ...]] | None = None
        if is_deterministic:
            starts = range(0, len(row_ids), max(1, batch_size))
            self._chunks = deque(row_ids[at : at + batch_size] for at in starts)
        self._num_taken = 0
        self.num_dispatched = 0
        self.num_finished = 0
        if num_producers == 0:
            self._ready.extend(row_ids)

    @property
    def is_finished(self) -> bool:
        """Whether every row has been finished."""
        return self.num_finished == self._num_rows

    @property
    def has_batch(self) -> bool:
        """Whether `take` can give a batch now."""
        if self._chunks is not None:
            return bool(self._chunks) and all(self._missing[r] == 0 for r in self._chunks[0])
        if self._pieces:
            return True
        left = self._num_rows - self._num_taken
        return bool(left) and len(self._ready) >= min(self._batch_size, left)

    def add(self, row_ids: Iterable[RowId]) -> None:
        """One more producer has finished these rows."""
        for row_id in row_ids:
            self._missing[row_id] -= 1
            if self._missing[row_id] == 0 and self._chunks is None:
                self._ready.append(row_id)

    def take(self) -> tuple[RowId, ...]:
        """The next batch; call only while `has_batch`."""
        if self._chunks is not None:
            row_ids = self._chunks.popleft()
        elif self._pieces or self._fill_pieces():
            row_ids = self._pieces.popleft()
        else:
            count = min(self._batch_size, self._num_rows - self._num_taken)
            row_ids = tuple(self._ready.popleft() for _ in range(count))
        self._num_taken += len(row_ids)
        self.num_dispatched += 1
        return row_ids

    def _fill_pieces(self) -> bool:
        if self._spread is not None:
            self._pieces.extend(self._spread(tuple(self._ready)))
        if self._pieces:
            self._ready.clear()
        return bool(self._pieces)

    def finish(self, num_rows: int) -> None:
        """Count rows of taken batches as finished."""
        self.num_finished += num_rows
