"""The weight syncs of a run: which are due, and whose weights are older than their trainer's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.engine.planning import synced_in_episode
from chatlearn.sync.synchronizer import SyncSettings, WeightSynchronizer
from chatlearn.sync.transport import spoil_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from chatlearn.engine.session import Session
    from chatlearn.runtime.contract import WorkerGroup
    from chatlearn.sync.synchronizer import SyncReport

__all__ = ["WeightSource", "WeightSyncs"]

Pair = tuple[str, str]


@dataclass(frozen=True)
class WeightSource:
    """Where a replica's weights come from.

    Attributes:
        pair: the sync that it is a destination of; None: the config.
        groups: replicas that have the weights; empty: the next sync brings them.
    """

    pair: Pair | None
    groups: Sequence[WorkerGroup]


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
        # And the number of its weights.
        self._versions: dict[str, int] = {}
        # A pair whose workers were replaced has none until its next sync.
        self._synchronizers: dict[Pair, WeightSynchronizer] = {}
        # Replicas, by model and number, that have half new weights or none until their next sync.
        self._unusable: set[tuple[str, int]] = set()
        for pair in self._pairs:
            self._synchronizer(pair)

    def synchronize(self, episode: int | None, keep: Collection[str] = ()) -> dict[str, float]:
        """Move the weights of every pair that is due; at the start (None) those of all.

        Args:
            episode: the one that ends, from 0.
            keep: destinations that stay as they are.
        """
        metrics: dict[str, float] = {}
        for pair in self._pairs:
            destination = pair[1]
            if destination in keep or not self.is_due(destination, episode):
                continue
            self._on_start(destination)
            # What it had when the run was saved, where a checkpoint says that.
            known = self._versions.get(destination) if episode is None else None
            version = self.version if known is None else known
            groups = {_name(group) for group in self._session.groups[destination]}
            # Until the sync is over; after one that failed they are spoiled.
            self._unusable |= groups
            report = self._synchronizer(pair).sync(version)
            self._unusable -= groups
            self._delivered[destination] = self._session.num_updates
            self._versions[destination] = version
            metrics[f"sync/{destination}/seconds"] = report.seconds
            metrics[f"sync/{destination}/bytes"] = float(report.num_bytes)
            self._on_sync(pair, report)
        self.version += 1
        return metrics

    def is_due(self, destination: str, episode: int | None) -> bool:
        """Whether a destination gets new weights when an episode ends; None: at the start."""
        return synced_in_episode(episode, self._session.config.model(destination).sync_frequency)

    def version_of(self, destination: str) -> int:
        """Number of the weights that a destination has."""
        return self._versions.get(destination, 0)

    @property
    def versions(self) -> dict[str, int]:
        """Numbers of the weights that all destinations have."""
        return {name: self.version_of(name) for _, name in self._pairs}

    def note_version(self, destination: str, version: int) -> None:
        """A destination has weights of this number from a checkpoint, or gets them at the start."""
        self._versions[destination] = version

    @property
    def stale(self) -> tuple[str, ...]:
        """Destinations whose weights are not those that their trainer has now."""
        now = self._session.num_updates
        return tuple(name for _, name in self._pairs if self._delivered.get(name) != now)

    def find_source(self, group: WorkerGroup) -> WeightSource | None:
        """Where a replica that is started anew gets the weights from that it had; None: nowhere.

        They are its trainer's, if that has not moved on since; else another replica has them,
        unless it waits for a sync itself. A replica that nothing asks before its next sync can wait
        for that.
        """
        name = group.model_name
        pair = next((pair for pair in self._pairs if pair[1] == name), None)
        if pair is None:
            # What the config gives is what it had.
            return WeightSource(None, ())
        groups = self._session.groups
        if self._delivered.get(name) == self._session.num_updates:
            return WeightSource(pair, groups[pair[0]])
        siblings = [
            other
            for other in groups[name]
            if other is not group and _name(other) not in self._unusable
        ]
        if siblings:
            return WeightSource(pair, siblings[:1])
        is_next = self._session.config.model(name).sync_frequency == 1
        if is_next and not self._session.loop.needs(name):
            return WeightSource(pair, ())
        return None

    def refresh(self, group: WorkerGroup, source: WeightSource) -> None:
        """Give a replica that was started anew the weights of `source`."""
        pair = source.pair
        if pair is None:
            return
        # The plans know the workers that are gone.
        known = self._synchronizers.pop(pair, None)
        if known is not None:
            known.close()
        self._unusable.add(_name(group))
        if not source.groups:
            group.call(spoil_weights, "the worker was started anew: its weights come with a sync")
            return
        naming = self._session.plan.flows.modules[source.groups[0].model_name].weight_naming
        namings = (naming, self._namings(pair)[1])
        synchronizer = self._build(source.groups, [group], namings)
        version = self.version_of(group.model_name)
        # Another replica must have what this one had; a trainer counts otherwise.
        held = version if source.groups[0].model_name == group.model_name else None
        try:
            synchronizer.sync(version, held)
        finally:
            synchronizer.close()
        self._unusable.discard(_name(group))

    def _synchronizer(self, pair: Pair) -> WeightSynchronizer:
        found = self._synchronizers.get(pair)
        if found is None:
            groups = self._session.groups
            found = self._build(groups[pair[0]], groups[pair[1]], self._namings(pair))
            self._synchronizers[pair] = found
        return found

    def close(self) -> None:
        """Forget the plans as the workers end, and with them what they keep."""
        self._synchronizers.clear()

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
        taker = self._session.plan.flows.modules[destinations[0].model_name]
        settings = SyncSettings(
            timeout_s=runtime.sync_timeout_s,
            mode=runtime.weight_sync_mode,
            checks=runtime.validate_param_sync,
            transport=runtime.weight_sync_transport,
            bucket_bytes=runtime.coalesced_buffer_mb << 20,
            left_out=taker.left_out_weights,
        )
        synchronizer = WeightSynchronizer(
            self._session.backend, sources, destinations, settings, namings
        )
        try:
            synchronizer.prepare()
        except BaseException:
            synchronizer.close()
            raise
        return synchronizer


def _name(group: WorkerGroup) -> tuple[str, int]:
    return group.model_name, group.replica
