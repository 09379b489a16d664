# pyright: standard, reportPrivateImportUsage=false
"""Calls that end when their worker dies, and what a failure is the consequence of."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from chatlearn.runtime.ray_errors import describe_failure, pick_cause

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from chatlearn.errors import WorkerError
    from chatlearn.runtime.contract import PendingCall, WorkerSummary

__all__ = ["DeathWatches"]

_GRACE_S = 1.0
# A broken connection is noticed before the death of a whole node is.
_DEATH_S = 5.0
_POLL_S = 0.2


class DeathWatches:
    """One call for each worker that fails when the worker dies."""

    def __init__(self) -> None:
        self._workers: dict[Any, WorkerSummary] = {}

    @property
    def refs(self) -> list[Any]:
        """The calls."""
        return list(self._workers)

    def add(self, ref: Any, worker: WorkerSummary) -> None:
        """Watch a worker by this call."""
        self._workers[ref] = worker

    def forget(self, workers: Collection[WorkerSummary]) -> None:
        """Watch these no longer."""
        self._workers = {ref: who for ref, who in self._workers.items() if who not in workers}

    def clear(self) -> None:
        """Watch nobody."""
        self._workers.clear()

    def ready(self) -> list[Any]:
        """The calls that have failed."""
        import ray

        refs = self.refs
        return ray.wait(refs, num_returns=len(refs), timeout=0)[0] if refs else []

    def raise_failures(
        self, ready: Sequence[Any], refs: Mapping[Any, PendingCall], waited: Sequence[Any]
    ) -> None:
        """Raise the likeliest first cause among calls that are done, if one of them failed."""
        failures = self._failures(ready, refs)
        if not failures:
            return
        import ray

        # One failure makes peers fail in turn; give the first cause a moment to show.
        time.sleep(_GRACE_S)
        if all(failure.is_collateral for failure in failures):
            self._await_death()
        known = list(dict.fromkeys([*waited, *self._workers]))
        later, _ = ray.wait(known, num_returns=len(known), timeout=0, fetch_local=False)
        raise pick_cause(self._failures(later, refs) or failures)

    def cause_of(self, error: Exception, call: PendingCall) -> WorkerError:
        """The likeliest first cause of what a call raised."""
        first = describe_failure(error, call.worker, call.flow_line)
        if first.is_death or not first.is_collateral:
            return first
        time.sleep(_GRACE_S)
        self._await_death()
        return pick_cause([first, *self._failures(self.ready(), {})])

    def _await_death(self) -> None:
        deadline = time.monotonic() + _DEATH_S
        while not self.ready() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _failures(self, ready: Sequence[Any], refs: Mapping[Any, PendingCall]) -> list[WorkerError]:
        import ray
        import ray.exceptions

        found: list[WorkerError] = []
        for ref in ready:
            call = refs.get(ref)
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                worker = call.worker if call is not None else self._workers.get(ref)
                line = call.flow_line if call is not None else ""
                found.append(describe_failure(error, worker, line))
        return found
