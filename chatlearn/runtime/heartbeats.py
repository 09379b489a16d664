# pyright: standard, reportPrivateImportUsage=false
"""Asks every worker now and then whether it is alive, and ends those that do not answer.

A worker's own thread answers, also while a call runs, so what does not answer is stopped,
swapped out, or holds Python's lock for good. It is killed; its death is then noticed like any
other. Driver side, on a thread of its own.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from chatlearn.runtime.contract import WorkerSummary

__all__ = ["Beat", "Heartbeats", "kill_workers"]

logger = logging.getLogger(__name__)

_LONGEST_INTERVAL_S = 5.0
_KILL_S = 15.0


@dataclass(frozen=True)
class Beat:
    """What a worker says of itself.

    Attributes:
        stage: the call that it runs, or `idle`.
        stage_s: since when, seconds.
        collective: its last collective.
    """

    stage: str
    stage_s: float
    collective: str


@dataclass
class _Asked:
    """A worker that is being watched."""

    handle: Any
    question: Any = None
    asked_s: float = 0.0
    beat: Beat | None = None
    beat_s: float = 0.0


class Heartbeats:
    """Watches the workers of one backend.

    Args:
        timeout_s: silence after which a worker counts as dead; None: it is only asked.
    """

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._interval_s = min((timeout_s or _LONGEST_INTERVAL_S) / 4, _LONGEST_INTERVAL_S)
        self._workers: dict[WorkerSummary, _Asked] = {}
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()

    def add(self, handles: Mapping[WorkerSummary, Any]) -> None:
        """Watch these workers from now on."""
        now = time.monotonic()
        with self._lock:
            self._workers.update({w: _Asked(h, beat_s=now) for w, h in handles.items()})

    def remove(self, worker: WorkerSummary) -> None:
        """Watch it no longer."""
        with self._lock:
            self._workers.pop(worker, None)

    def describe(self, worker: WorkerSummary) -> str:
        """What was last heard of a worker."""
        with self._lock:
            asked = self._workers.get(worker)
        if asked is None or asked.beat is None:
            return "nothing was heard of it yet"
        ago = time.monotonic() - asked.beat_s
        beat = asked.beat
        return (
            f"last heartbeat {ago:.0f} s ago: {beat.stage} for {beat.stage_s:.0f} s then, "
            f"{beat.collective}"
        )

    def close(self) -> None:
        """End the thread."""
        self._is_closed.set()
        self._thread.join(_KILL_S)

    def _run(self) -> None:
        import ray

        while not self._is_closed.wait(self._interval_s):
            if not ray.is_initialized():
                # Ray would connect by itself for the next question, to whatever there is.
                return
            with self._lock:
                workers = dict(self._workers)
            silent: dict[WorkerSummary, Any] = {}
            for worker, asked in workers.items():
                if self._is_closed.is_set():
                    return
                try:
                    if self._is_silent(worker, asked):
                        silent[worker] = asked.handle
                except Exception:  # noqa: BLE001 - a watch must not end the run
                    # It is dead, which its other watch tells.
                    self.remove(worker)
            if silent:
                self._declare_dead(silent)

    def _is_silent(self, worker: WorkerSummary, asked: _Asked) -> bool:
        """Ask a worker, or look at its answer; True once it has been silent for too long."""
        import ray

        now = time.monotonic()
        if asked.question is None:
            beat = asked.handle.beat.options(concurrency_group="control")
            asked.question, asked.asked_s = beat.remote(), now
            return False
        ready, _ = ray.wait([asked.question], timeout=0)
        if ready:
            asked.beat, asked.beat_s = ray.get(asked.question), now
            asked.question = None
        elif self._timeout_s is not None and now - asked.asked_s > self._timeout_s:
            logger.error(
                "%s.r%d.%d has not answered for %.0f s (runtime.heartbeat_timeout_s) and is "
                "killed; %s",
                worker.model_name,
                worker.replica,
                worker.rank,
                now - asked.asked_s,
                self.describe(worker),
            )
            self.remove(worker)
            return True
        return False

    def _declare_dead(self, silent: Mapping[WorkerSummary, Any]) -> None:
        """Let Ray call these dead at once, and end their processes where they can be reached.

        On a node that is cut off nobody can; without the first step the run would wait until Ray
        gives up the node, a minute or more.
        """
        import ray

        try:
            for handle in silent.values():
                ray.kill(handle)
            kill_workers(silent)
        except Exception as error:  # noqa: BLE001 - a watch must not end the run
            logger.warning("workers that do not answer could not be ended: %s", error)


def kill_workers(workers: Collection[WorkerSummary]) -> None:
    """End workers' processes, also ones that are stopped; nothing where their node is gone."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own_node = ray.get_runtime_context().get_node_id()
    alive = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(_kill)
    asked: dict[Any, WorkerSummary] = {}
    for worker in workers:
        if worker.node_id == own_node:
            _kill(worker.process_id)
        elif worker.node_id in alive:
            strategy = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
            task = remote.options(scheduling_strategy=strategy).remote(worker.process_id)
            asked[task] = worker
    if asked:
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=_KILL_S)
        hosts = sorted({asked[task].host for task in late})
        if hosts:
            logger.warning("%s: nobody answers; workers there count as dead", ", ".join(hosts))


def _kill(process_id: int) -> None:
    try:
        os.kill(process_id, signal.SIGKILL)
    except ProcessLookupError:
        return
