"""From an episode's samples to training batches. Pure: rows are ids with opaque sources."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from chatlearn.data.rows import RowId

__all__ = ["StreamDataset"]


class StreamDataset:
    """The samples of one episode on their way from rollout to training.

    A batch is a run of consecutive row ids, so it depends neither on the generation batch size
    nor on what arrives first. In `fixed` mode a batch can be had as soon as its rows are there;
    in `dynamic` mode once every row is. The last batch may be short; no row is ever repeated.

    Args:
        row_ids: every sample of the episode.
        batch_size: rows of one training batch.
        is_dynamic: wait for all rows.
        is_sorted: cut batches in the order of the ids, else in the order given.
    """

    def __init__(
        self,
        row_ids: Sequence[RowId],
        batch_size: int,
        *,
        is_dynamic: bool = False,
        is_sorted: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}")
        self._order = sorted(row_ids) if is_sorted else list(row_ids)
        self._batch_size = batch_size
        self._is_dynamic = is_dynamic
        self._sources: dict[RowId, Any] = {}

    @property
    def num_rows(self) -> int:
        """Rows that the episode will have."""
        return len(self._order)

    @property
    def num_arrived(self) -> int:
        """Rows that are there."""
        return len(self._sources)

    @property
    def is_complete(self) -> bool:
        """Whether every row is there."""
        return len(self._sources) == len(self._order)

    @property
    def num_batches(self) -> int:
        """Training batches of one epoch."""
        return -(-len(self._order) // self._batch_size)

    def add(self, row_id: RowId, source: Any) -> None:
        """A row has arrived."""
        self._sources[row_id] = source

    def has_batch(self, index: int) -> bool:
        """Whether batch `index` of the first epoch can be had."""
        if self._is_dynamic:
            return self.is_complete
        return all(row_id in self._sources for row_id in self.batch_ids(index))

    def batch(self, index: int) -> dict[RowId, Any]:
        """Rows of batch `index` of the first epoch with their sources."""
        return {row_id: self._sources[row_id] for row_id in self.batch_ids(index)}

    def later_epoch(
        self, epoch: int, *, mode: str, seed: int, episode: int
    ) -> list[dict[RowId, Any]]:
        """The batches of a training epoch after the first, shuffled.

        Args:
            epoch: 1 or more.
            mode: `batch` shuffles the order of the first epoch's batches, `sample` the rows.
            seed: of the run.
            episode: of the run.
        """
        shuffler = random.Random(f"{seed}/{episode}/{epoch}")
        if mode == "batch":
            indices = list(range(self.num_batches))
            shuffler.shuffle(indices)
            return [self.batch(index) for index in indices]
        order = list(self._order)
        shuffler.shuffle(order)
        size = self._batch_size
        return [
            {row_id: self._sources[row_id] for row_id in order[start : start + size]}
            for start in range(0, len(order), size)
        ]

    def sources(self) -> Mapping[RowId, Any]:
        """Every row that is there, in row order."""
        return {row_id: self._sources[row_id] for row_id in self._order if row_id in self._sources}

    def batch_ids(self, index: int) -> list[RowId]:
        """Row ids of batch `index` of the first epoch."""
        return self._order[index * self._batch_size : (index + 1) * self._batch_size]
