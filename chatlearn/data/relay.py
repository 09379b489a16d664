"""The samples of past episodes, for a user's sample manager that decides what is trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, cast

from chatlearn.data.rows import RowId
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from chatlearn.config import RuntimeConfig

__all__ = ["EpisodeRelayBuffer", "RelaySampleManager", "RelayStore", "identify_rows"]


@dataclass(frozen=True)
class EpisodeRelayBuffer:
    """One episode's samples: a dict of columns per row, with its `row_id`."""

    episode_id: int
    buffer: list[dict[str, Any]]


class RelaySampleManager:
    """Decides what becomes of the last episodes' samples; subclass it and override `__call__`.

    Attributes:
        uses_past_episodes: False where `__call__` looks at the newest episode only; then a
            `runtime.max_relay_episode` that keeps others is refused.
    """

    uses_past_episodes: bool = True

    def __init__(self) -> None:
        self._metrics: dict[str, float] = {}

    def __call__(self, episodes: Sequence[EpisodeRelayBuffer]) -> list[dict[str, Any]]:
        """The rows to train on; the default trains on the newest episode as it is.

        Without any row the episode is not trained on.

        Args:
            episodes: the kept episodes, oldest first; the last is the current one.
        """
        return episodes[-1].buffer

    def attach(self, runtime: RuntimeConfig) -> None:
        """Take what it needs from the config's runtime section; called before the first episode."""

    def state(self) -> Mapping[str, Any]:
        """What a resumed run needs of this manager: plain values; the default has none."""
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Report numbers under `relay/`."""
        self._metrics.update({name: float(value) for name, value in metrics.items()})

    def take_metrics(self) -> dict[str, float]:
        """What was logged since the last time, and forget it."""
        taken, self._metrics = self._metrics, {}
        return taken


class RelayStore:
    """Keeps the last episodes.

    Args:
        max_episodes: episodes kept; -1: all; 0: only the current one.
        offset: first episode that is kept beyond its own turn.
    """

    def __init__(self, max_episodes: int, offset: int = 0) -> None:
        self._max_episodes = max_episodes
        self._offset = offset
        self._episodes: list[EpisodeRelayBuffer] = []

    def add(self, episode: EpisodeRelayBuffer) -> list[EpisodeRelayBuffer]:
        """Take an episode in; gives what a sample manager sees, oldest first."""
        kept = [e for e in self._episodes if e.episode_id >= self._offset]
        self._episodes = [*kept, episode]
        if self._max_episodes >= 0:
            self._episodes = self._episodes[-max(self._max_episodes, 1) :]
        return list(self._episodes)

    @property
    def episodes(self) -> tuple[EpisodeRelayBuffer, ...]:
        """The kept episodes that the next one can still see, oldest first.

        Their rows are copies of one level; `restore` takes them back.
        """
        kept = [e for e in self._episodes if e.episode_id >= self._offset]
        if self._max_episodes >= 0:
            kept = kept[len(kept) - min(len(kept), max(self._max_episodes, 1) - 1) :]
        return tuple(
            EpisodeRelayBuffer(e.episode_id, [dict(row) for row in e.buffer]) for e in kept
        )

    def restore(self, episodes: Sequence[EpisodeRelayBuffer]) -> None:
        """Go on with these episodes."""
        self._episodes = list(episodes)


def identify_rows(rows: Sequence[Mapping[str, Any]]) -> dict[RowId, dict[str, Any]]:
    """Rows that a sample manager gave, by id.

    A row keeps its `row_id`; where a row occurs again, or has none, it gets a fresh id.

    Raises:
        DataError: it gave no list of rows, or one is no mapping or has something else as its id.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DataError(f"the sample manager gave {type(rows).__name__}; expected a list of rows")
    found: dict[RowId, dict[str, Any]] = {}
    own_ids = [_read_id(row) for row in rows]
    given = set(own_ids)
    fresh_ids = (RowId(-at, 0) for at in count(1))
    for row, own_id in zip(rows, own_ids, strict=True):
        columns = {key: value for key, value in row.items() if key != "row_id"}
        row_id = own_id
        if row_id is None or row_id in found:
            row_id = next(fresh for fresh in fresh_ids if fresh not in given)
        found[row_id] = columns
    return found


def _read_id(row: object) -> RowId | None:
    if not isinstance(row, Mapping):
        raise DataError(
            f"the sample manager gave a row of type {type(row).__name__}; expected a dict"
        )
    row_id: object = cast("Mapping[str, object]", row).get("row_id")
    if row_id is None:
        return None
    if isinstance(row_id, tuple):
        parts = cast("tuple[Any, ...]", row_id)
        if [type(part) for part in parts] == [int, int]:
            return RowId(*parts)
    raise DataError(
        f"the sample manager gave a row with row_id={row_id!r}; expected the row_id of a sample, a "
        "pair of integers, or none for a new row"
    )
