# pyright: standard, reportPrivateImportUsage=false
"""Ends workers' processes wherever they are, and removes what they leave behind there."""

from __future__ import annotations

import logging
import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from chatlearn.runtime.contract import WorkerSummary

__all__ = ["kill_workers", "sweep_workers"]

logger = logging.getLogger(__name__)

_ANSWER_S = 15.0
_GONE_S = 5.0
_SHARED_MEMORY = Path("/dev/shm")


def kill_workers(workers: Collection[WorkerSummary]) -> None:
    """End workers' processes, also ones that are stopped; nothing where their node is gone."""
    _run_beside(_kill, workers)


def sweep_workers(workers: Collection[WorkerSummary]) -> None:
    """Remove what workers that end now leave in shared memory.

    A process that lets others open its tensors on a GPU has a file of torch's there, in which they
    count themselves; torch removes it only where the process ends by itself, which Ray's do not.
    """
    _run_beside(_sweep, workers)


def _run_beside(function: Callable[[int], None], workers: Collection[WorkerSummary]) -> None:
    """Call a function with each worker's process id, on its node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    own_node = ray.get_runtime_context().get_node_id()
    alive = {str(node["NodeID"]) for node in ray.nodes() if node["Alive"]}
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    asked: dict[Any, WorkerSummary] = {}
    for worker in workers:
        if worker.node_id == own_node:
            function(worker.process_id)
        elif worker.node_id in alive:
            strategy = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
            task = remote.options(scheduling_strategy=strategy).remote(worker.process_id)
            asked[task] = worker
    if asked:
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
        hosts = sorted({asked[task].host for task in late})
        if hosts:
            logger.warning("%s: nobody answers; workers there count as dead", ", ".join(hosts))


def _kill(process_id: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
    _sweep(process_id)


def _sweep(process_id: int) -> None:
    """Wait until a process is gone, and remove torch's files of it."""
    import psutil

    left = [path for path in _SHARED_MEMORY.glob(f"torch_{process_id}_*") if _is_own(path)]
    if not left:
        return
    try:
        psutil.Process(process_id).wait(_GONE_S)
    except psutil.NoSuchProcess:
        pass
    except psutil.TimeoutExpired:
        return
    for path in left:
        path.unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False
