"""The driver's event loop: running flows dispatch calls, finished calls come back to them.

Single-threaded: several flows (rollout and training, say) make progress in one loop, and every
wait has a bound.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from chatlearn.errors import FlowError, WaitTimeoutError, WorkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from chatlearn.runtime.contract import Backend, PendingCall

__all__ = ["CallLoop", "LostCalls", "Pump"]

_POLL_S = 1.0


class Pump(Protocol):
    """Something that dispatches calls whenever it can."""

    def pump(self) -> None:
        """Dispatch what can run now; must not block."""
        ...

    def needs(self, model_name: str) -> bool:
        """Whether calls of a model are still to come or running."""
        ...


@dataclass
class _Batch:
    """Calls that belong together: done when all of them are."""

    waiting: int
    on_done: Callable[[], None]
    what: str
    started_s: float
    on_lost: Callable[[], None] | None = None


@dataclass(frozen=True)
class LostCalls:
    """Calls that ran on a replica that is gone.

    Attributes:
        again: what to run for each of them once the replica is there again.
        seconds: how long they had run, together.
    """

    again: tuple[Callable[[], None], ...]
    seconds: float


class CallLoop:
    """Submits calls and routes their completion. Owned by one run, used from one thread.

    Attributes:
        interrupt: called between waits where set; may raise to end the loop.
        recover: called with the error of a worker that failed, where set; True: the run goes on.
    """

    def __init__(self, backend: Backend, stage_timeout_s: float) -> None:
        self.backend = backend
        self.stage_timeout_s = stage_timeout_s
        self.interrupt: Callable[[], None] | None = None
        self.recover: Callable[[WorkerError], bool] = lambda _error: False
        self._is_held = False
        self._poll_s = min(_POLL_S, stage_timeout_s)
        self._checked_s = time.monotonic()
        self._pumps: list[Pump] = []
        self._open: dict[int, tuple[PendingCall, _Batch]] = {}

    def attach(self, pump: Pump) -> None:
        """Let `pump` dispatch in this loop from now on."""
        self._pumps.append(pump)

    def detach(self, pump: Pump) -> None:
        """Stop asking `pump`."""
        if pump in self._pumps:
            self._pumps.remove(pump)

    def detach_all(self) -> None:
        """Dispatch nothing more for anyone; calls that run may end."""
        self._pumps.clear()

    def submit(
        self,
        calls: Sequence[PendingCall],
        on_done: Callable[[], None],
        what: str,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        """Watch calls that were just started.

        Args:
            calls: that belong together.
            on_done: runs when the last of them is done.
            what: names them in messages.
            on_lost: runs instead where their worker was replaced; None: they cannot be made again.
        """
        batch = _Batch(len(calls), on_done, what, time.monotonic(), on_lost)
        for call in calls:
            self._open[id(call)] = (call, batch)

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Dispatch and wait until `is_done()`.

        Raises:
            WorkerError: a call raised or its worker died.
            WaitTimeoutError: calls outlasted `stage_timeout_s`.
            FlowError: nothing runs and nothing can be dispatched.
        """
        self._heed_interrupt()
        while not is_done():
            self._heed_interrupt()
            for pump in tuple(self._pumps):
                pump.pump()
            if is_done():
                return
            if not self._open:
                raise FlowError("the flow stalls: no call runs and none can be dispatched")
            self._wait()

    def _heed_interrupt(self) -> None:
        if self.interrupt is not None and not self._is_held:
            self.interrupt()

    @contextmanager
    def uninterrupted(self) -> Generator[None]:
        """Within this `interrupt` is not called, so that nothing is left half done."""
        before, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = before

    def needs(self, model_name: str) -> bool:
        """Whether a flow that is attached still needs a model."""
        return any(pump.needs(model_name) for pump in self._pumps)

    def take_lost(self, model_name: str, replica: int) -> LostCalls | None:
        """The open calls on a replica, which are watched no longer; None if one of them must end.

        After None everything is as it was.
        """
        found: dict[int, _Batch] = {}
        for call, batch in self._open.values():
            if (call.worker.model_name, call.worker.replica) == (model_name, replica):
                found[id(batch)] = batch
        batches = list(found.values())
        actions = [batch.on_lost for batch in batches if batch.on_lost is not None]
        if len(actions) < len(batches):
            return None
        self._open = {
            key: (call, batch)
            for key, (call, batch) in self._open.items()
            if id(batch) not in found
        }
        now = time.monotonic()
        return LostCalls(tuple(actions), sum(now - batch.started_s for batch in batches))

    def _wait(self) -> None:
        calls = [call for call, _ in self._open.values()]
        try:
            done = self.backend.wait_any(calls, self._poll_s)
        except WaitTimeoutError:
            done = ()
        except WorkerError as error:
            if not self.recover(error):
                raise
            return
        for call in done:
            _, batch = self._open.pop(id(call), (call, None))
            if batch is None:
                # Lost while another call's completion led to a recovery.
                continue
            batch.waiting -= 1
            if batch.waiting == 0:
                batch.on_done()
        # Also where calls finish all the time: one of the others may hang.
        if time.monotonic() - self._checked_s >= self._poll_s:
            self._check_deadlines()

    def _check_deadlines(self) -> None:
        now = self._checked_s = time.monotonic()
        late = {
            call.worker: f"{batch.what} on "
            f"{call.worker.model_name}.r{call.worker.replica}.{call.worker.rank}"
            f" for {now - batch.started_s:.0f} s"
            for call, batch in self._open.values()
            if now - batch.started_s > self.stage_timeout_s
        }
        if late:
            raise WaitTimeoutError(
                f"stages outlasted runtime.stage_timeout_s={self.stage_timeout_s:g}: "
                + "; ".join(list(late.values())[:8])
                + ". Raise the limit if the stage is just slow.",
                tuple(late),
            )
