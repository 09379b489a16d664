# pyright: standard, reportPrivateImportUsage=false
"""Calls on the ranks of a sync, by the index of their endpoint, every wait bounded."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatlearn.errors import SyncError, WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from chatlearn.runtime.contract import Backend, PendingCall, WorkerGroup

__all__ = ["Failure", "RankCalls"]

_LEAST_FETCH_S = 1.0


@dataclass(frozen=True)
class Failure:
    """What a rank gives back when it waited for others in vain: often none of it is its fault.

    Attributes:
        text: what happened.
        is_lost: a connection broke, as it does when another rank gives up.
        peer: endpoint that it waited for, where it is one.
    """

    text: str
    is_lost: bool = False
    peer: int | None = None


class RankCalls:
    """The ranks of both models, sources first.

    Args:
        backend: runs the calls.
        groups: worker groups of all replicas.
        what: begins every message.
        timeout_s: limit of what `deadline` gives.

    Attributes:
        awaited: for an endpoint a tensor that others await from it; shown in messages.
        taken: for an endpoint the first tensor that it takes; likewise.
    """

    def __init__(
        self, backend: Backend, groups: Sequence[WorkerGroup], what: str, timeout_s: float
    ) -> None:
        self._backend = backend
        self._what = what
        self._timeout_s = timeout_s
        self._places = [(group, at) for group in groups for at in range(group.layout.world_size)]
        self.awaited: Mapping[int, str] = {}
        self.taken: Mapping[int, str] = {}

    @property
    def count(self) -> int:
        """How many ranks there are."""
        return len(self._places)

    def deadline(self) -> float:
        """The end of a step that begins now, on the monotonic clock."""
        return time.monotonic() + self._timeout_s

    def run(
        self,
        function: Callable[..., Any],
        ranks: Iterable[int],
        deadline: float,
        purpose: str,
        arguments: Callable[[int], tuple[Any, ...]],
    ) -> dict[int, Any]:
        """Run `function(context, *arguments(index))` on some ranks at once; gives the results.

        Raises:
            WorkerError: a rank failed.
            WaitTimeoutError: ranks did not answer in time; names them and what is awaited.
            SyncError: all answered, some with a `Failure`.
        """
        return self.gather(self.start(function, ranks, arguments), deadline, purpose)

    def start(
        self,
        function: Callable[..., Any],
        ranks: Iterable[int],
        arguments: Callable[[int], tuple[Any, ...]],
    ) -> dict[int, PendingCall]:
        """Like `run`, without waiting."""
        calls: dict[int, PendingCall] = {}
        for at in ranks:
            group, rank = self._places[at]
            (calls[at],) = group.call(function, *arguments(at), ranks=(rank,))
        return calls

    def gather(
        self, calls: Mapping[int, PendingCall], deadline: float, purpose: str
    ) -> dict[int, Any]:
        """Wait for what `start` gave; as `run`."""
        late = self._wait(calls, deadline)
        found = {
            at: self._backend.fetch(call, max(_LEAST_FETCH_S, deadline - time.monotonic()))
            for at, call in calls.items()
            if at not in late
        }
        failures = [value for value in found.values() if isinstance(value, Failure)]
        # Who waits in vain says so; who never answers is the cause.
        first = min(failures, key=lambda each: (each.peer not in late, each.is_lost), default=None)
        if late:
            raise WaitTimeoutError(
                f"{self._what}: within {self._timeout_s:g} s (runtime.sync_timeout_s) these ranks "
                f"did not {purpose}: {self._name(late)}{f'; {first.text}' if first else ''}",
                [call.worker for call in late.values()],
            )
        if first is not None:
            error = SyncError(f"{self._what}: {first.text}")
            error.is_retryable = True
            raise error
        return found

    def tell(self, function: Callable[..., Any], ranks: Iterable[int], *arguments: Any) -> None:
        """Start a function on some ranks without waiting: it runs before any later call there."""
        for at in ranks:
            group, rank = self._places[at]
            group.call(function, *arguments, ranks=(rank,))

    def _wait(self, calls: Mapping[int, PendingCall], deadline: float) -> dict[int, PendingCall]:
        """The calls that are not done in time."""
        left = dict(calls)
        while left:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            try:
                done = self._backend.wait_any(tuple(left.values()), min(remaining, 1.0))
            except WaitTimeoutError:
                continue
            finished = {id(call) for call in done}
            left = {at: call for at, call in left.items() if id(call) not in finished}
        return left

    def _name(self, calls: Mapping[int, PendingCall]) -> str:
        names: list[str] = []
        for at, call in calls.items():
            worker = call.worker
            name = f"{worker.model_name}.r{worker.replica}.{worker.rank}"
            if at in self.awaited:
                name += f" (others await {self.awaited[at]} from it)"
            elif at in self.taken:
                name += f" (it takes {self.taken[at]} first)"
            names.append(name)
        return ", ".join(names)
