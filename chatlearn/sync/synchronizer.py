"""Keeps one destination model's weights equal to its source's: plan once, move every time."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatlearn.errors import SyncError, WaitTimeoutError
from chatlearn.sync.plan import Endpoint, Message, SyncPlan, plan_sync
from chatlearn.sync.transport import (
    ChannelAddress,
    describe_endpoint,
    export_weights,
    host_channel,
    move_weights,
    open_channel,
    take_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatlearn.runtime.contract import Backend, PendingCall, WorkerGroup

__all__ = ["SyncReport", "WeightSynchronizer"]


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    Attributes:
        start_s: seconds since the epoch.
        end_s: seconds since the epoch.
        num_bytes: payload that was moved.
    """

    start_s: float
    end_s: float
    num_bytes: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end_s - self.start_s


class WeightSynchronizer:
    """Moves the weights of one model to every replica of another.

    Args:
        backend: runs the calls.
        sources: worker groups of the model that is trained.
        destinations: worker groups of its inference twin.
        timeout_s: limit of each step, seconds.
        validate: compare every element after each sync.
    """

    def __init__(
        self,
        backend: Backend,
        sources: Sequence[WorkerGroup],
        destinations: Sequence[WorkerGroup],
        *,
        timeout_s: float,
        validate: bool = False,
    ) -> None:
        self._backend = backend
        self._sources = tuple(sources)
        self._destinations = tuple(destinations)
        self._timeout_s = timeout_s
        self._validate = validate
        self._key = f"{sources[0].model_name} -> {destinations[0].model_name}"
        self._plan: SyncPlan | None = None

    @property
    def plan(self) -> SyncPlan:
        """The plan; `prepare` makes it."""
        if self._plan is None:
            raise SyncError(f"the sync {self._key} has not been prepared")
        return self._plan

    def prepare(self) -> None:
        """Gather the descriptions, plan, and open the channel.

        Raises:
            SyncError: the two models do not fit together.
        """
        sources = self._describe(self._sources)
        destinations = self._describe(self._destinations)
        self._plan = plan_sync(sources, destinations)
        if not self._is_one_process:
            self._open_channel()

    def sync(self, version: int) -> SyncReport:
        """Move the weights; the destinations have them all when this returns.

        Args:
            version: number of the weights, given to the destinations' modules.

        Raises:
            WorkerError: a rank failed; its message names peer and tensor.
            WaitTimeoutError: a rank did not answer in time.
        """
        start_s = time.time()
        self._execute(version, is_check=False)
        if self._validate:
            self._execute(version, is_check=True)
        return SyncReport(start_s, time.time(), self.plan.num_bytes)

    def close(self) -> None:
        """Forget the plan; channels end with their workers."""
        self._plan = None

    @property
    def _is_one_process(self) -> bool:
        return len({(e.node_id, e.process_id) for e in self.plan.endpoints}) == 1

    def _execute(self, version: int, *, is_check: bool) -> None:
        if self._is_one_process:
            (exported,) = self._sources[0].call(export_weights)
            self._wait([exported])
            messages = self.plan.messages
            (taken,) = self._destinations[0].call(
                take_weights, messages, exported.outputs[0], version, is_check
            )
            self._wait([taken])
            return
        parts: list[list[Message]] = [[] for _ in self.plan.endpoints]
        for message in self.plan.messages:
            parts[message.source].append(message)
            parts[message.destination].append(message)
        self._on_every_rank(
            lambda group, rank, number: group.call(
                move_weights, self._key, tuple(parts[number]), version, is_check, ranks=(rank,)
            )
        )

    def _open_channel(self) -> None:
        labels = tuple(endpoint.label for endpoint in self.plan.endpoints)
        (hosted,) = self._sources[0].call(host_channel, self._key, ranks=(0,))
        host, port = self._backend.fetch(hosted, self._timeout_s)
        address = ChannelAddress(self._key, host, port, len(labels), labels)
        self._on_every_rank(
            lambda group, rank, number: group.call(open_channel, address, number, ranks=(rank,))
        )

    def _on_every_rank(
        self, start: Callable[[WorkerGroup, int, int], tuple[PendingCall, ...]]
    ) -> None:
        calls: list[PendingCall] = []
        for group in (*self._sources, *self._destinations):
            for rank in range(group.layout.world_size):
                calls.extend(start(group, rank, len(calls)))
        self._wait(calls)

    def _describe(self, groups: Sequence[WorkerGroup]) -> list[Endpoint]:
        calls = [call for group in groups for call in group.call(describe_endpoint)]
        self._wait(calls)
        found: list[Any] = [self._backend.fetch(call, self._timeout_s) for call in calls]
        return found

    def _wait(self, calls: Sequence[PendingCall]) -> None:
        deadline = time.monotonic() + self._timeout_s
        left = {id(call): call for call in calls}
        while left:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                late = ", ".join(
                    f"{c.worker.model_name}.r{c.worker.replica}.{c.worker.rank}"
                    for c in left.values()
                )
                raise WaitTimeoutError(
                    f"weight sync {self._key}: no answer within "
                    f"runtime.sync_timeout_s={self._timeout_s:g} from {late}"
                )
            try:
                done = self._backend.wait_any(tuple(left.values()), min(remaining, 1.0))
            except WaitTimeoutError:
                continue
            for call in done:
                left.pop(id(call))
