# pyright: standard, reportPrivateImportUsage=false
"""What every worker does at this moment, for a person who wonders why nothing goes on."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from chatlearn.runtime.contract import WorkerSummary
    from chatlearn.runtime.heartbeats import Heartbeats

__all__ = ["explain_workers"]

logger = logging.getLogger(__name__)

_ANSWER_S = 5.0
_SHOWN = 4


def explain_workers(
    actors: Iterable[tuple[Any, WorkerSummary]],
    awaited: Sequence[WorkerSummary],
    heartbeats: Heartbeats | None,
    folder: Path,
) -> str:
    """Ask every worker for its stacks, its stage and its last collective.

    Of those that do not answer within seconds the last heartbeat is told.

    Args:
        actors: with their workers.
        awaited: shown first, and in the text that is given; all go into a file.
        heartbeats: of the run.
        folder: where the file goes.
    """
    import ray

    questions: dict[WorkerSummary, list[Any]] = {}
    for actor, worker in actors:
        handle = actor.handle
        questions[worker] = [
            getattr(handle, name).options(concurrency_group="control").remote()
            for name in ("beat", "stack")
        ]
    refs = [ref for pair in questions.values() for ref in pair]
    ray.wait(refs, num_returns=len(refs), timeout=_ANSWER_S)
    reports = {worker: _report(worker, pair, heartbeats) for worker, pair in questions.items()}
    chosen = set(awaited)
    order = sorted(reports, key=lambda worker: worker not in chosen)
    path = folder / f"hang-{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}.txt"
    try:
        path.write_text("\n\n".join(reports[worker] for worker in order) + "\n", encoding="utf-8")
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, error)
    shown = "\n\n".join(reports[worker] for worker in order[:_SHOWN])
    return f"{shown}\n\nall {len(order)} workers: {path}"


def _report(worker: WorkerSummary, pair: list[Any], heartbeats: Heartbeats | None) -> str:
    import ray
    import ray.exceptions

    name = f"{worker.model_name}.r{worker.replica}.{worker.rank} on {worker.host}"
    try:
        beat, stack = ray.get(pair, timeout=0)
    except ray.exceptions.RayError:
        last = heartbeats.describe(worker) if heartbeats is not None else ""
        return f"{name} does not answer; {last}"
    return f"{name}: {beat.stage} for {beat.stage_s:.0f} s, {beat.collective}\n{stack.rstrip()}"
