"""The weight syncs of a run: which are due, and whose weights are older than their trainer's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlearn.engine.planning import synced_in_episode
from chatlearn.sync.synchronizer import SyncSettings, WeightSynchronizer

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from chatlearn.engine.session import Session
    from chatlearn.runtime.contract import WorkerGroup
    from chatlearn.sync.synchronizer import SyncReport

__all__ = ["WeightSyncs"]

Pair = tuple[str, str]


class WeightSyncs:
    """Every pair of `set_parameter_sync`.

    Args:
        session: the run.
        on_sync: called with a pair and the report of each sync.
        on_start: called with a destination's name before its sync.

    Attributes:
        version: number of the weights that the next sync gives.
    """

    def __init__(
        self,
        session: Session,
        on_sync: Callable[[Pair, SyncReport], None] = lambda _pair, _report: None,
        on_start: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self.version = 0
        self._session = session
        self._on_sync = on_sync
        self._on_start = on_start
        self._pairs = session.plan.flows.syncs
        # For each destination: updates that its weights have seen; absent: not its trainer's.
        self._delivered: dict[str, int] = {}
        self._synchronizers: dict[Pair, WeightSynchronizer] = {
            pair: self._build(session.groups[pair[0]], session.groups[pair[1]], self._namings(pair))
            for pair in self._pairs
        }

    def synchronize(self, episode: int | None, keep: Collection[str] = ()) -> dict[str, float]:
        """Move the weights of every pair that is due; at the start (None) those of all.

        Args:
            episode: the one that ends, from 0.
            keep: destinations that stay as they are.
        """
        metrics: dict[str, float] = {}
        for pair in self._pairs:
            destination = pair[1]
            frequency = self._session.config.model(destination).sync_frequency
            if destination in keep or not synced_in_episode(episode, frequency):
                continue
            self._on_start(destination)
            report = self._synchronizers[pair].sync(self.version)
            self._delivered[destination] = self._session.num_updates
            metrics[f"sync/{destination}/seconds"] = report.seconds
            metrics[f"sync/{destination}/bytes"] = float(report.num_bytes)
            self._on_sync(pair, report)
        self.version += 1
        return metrics

    @property
    def stale(self) -> tuple[str, ...]:
        """Destinations whose weights are not those that their trainer has now."""
        now = self._session.num_updates
        return tuple(name for _, name in self._pairs if self._delivered.get(name) != now)

    def close(self) -> None:
        """Forget the plans."""
        for synchronizer in self._synchronizers.values():
            synchronizer.close()

    def _namings(self, pair: Pair) -> tuple[str, str]:
        modules = self._session.plan.flows.modules
        return modules[pair[0]].weight_naming, modules[pair[1]].weight_naming

    def _build(
        self,
        sources: Sequence[WorkerGroup],
        destinations: Sequence[WorkerGroup],
        namings: tuple[str, str],
    ) -> WeightSynchronizer:
        runtime = self._session.config.runtime
        settings = SyncSettings(
            timeout_s=runtime.sync_timeout_s,
            mode=runtime.weight_sync_mode,
            checks=runtime.validate_param_sync,
            transport=runtime.weight_sync_transport,
            bucket_bytes=runtime.coalesced_buffer_mb << 20,
        )
        synchronizer = WeightSynchronizer(
            self._session.backend, sources, destinations, settings, namings
        )
        synchronizer.prepare()
        return synchronizer
