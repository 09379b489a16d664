"""Runs an engine, and again from its last checkpoint where workers died that it needs."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from chatlearn.checkpoint.drafts import remove_drafts
from chatlearn.engine.recovery import ROLL_BACK, Recovery, RecoveryBudget
from chatlearn.engine.resume import find_resume_point, read_history
from chatlearn.engine.session import Session
from chatlearn.errors import WorkerError

if TYPE_CHECKING:
    from chatlearn.engine.engine import Engine
    from chatlearn.engine.planning import RunPlan
    from chatlearn.engine.result import RunResult
    from chatlearn.engine.resume import ResumePoint
    from chatlearn.engine.rollout import RolloutState
    from chatlearn.engine.run import Run
    from chatlearn.engine.run_log import RunLog
    from chatlearn.engine.sigterm import SigtermWatch

__all__ = ["Attempts"]

logger = logging.getLogger(__name__)


class Attempts:
    """The tries at one run; they share its folder and its place in the cluster.

    Args:
        engine: what runs.
        plan: of the run.
        log: what it leaves behind.
        watch: tells the loop of a SIGTERM.
    """

    def __init__(self, engine: Engine, plan: RunPlan, log: RunLog, watch: SigtermWatch) -> None:
        self._engine = engine
        self._plan = plan
        self._log = log
        self._watch = watch
        self._budget = RecoveryBudget(
            plan.config.runtime.max_restarts,
            log.folder.path / "recoveries.jsonl",
            log.progress.message,
        )
        self._start_s = time.monotonic()
        self._failure: tuple[Exception, float, int] | None = None
        self._beginning: RolloutState | None = None

    def run(self, first: ResumePoint | None) -> RunResult:
        """Run to the end; every worker is gone when this returns or raises.

        Args:
            first: the checkpoint that the run starts from, if any.
        """
        backend = _create_backend(self._plan, self._log)
        point = first
        try:
            while True:
                try:
                    return self._try(backend, point)
                except Exception as error:
                    self._watch.heed(error)
                    if not self._budget.take(error):
                        raise
                    logger.warning("going back to the last checkpoint: %s", error)
                self._watch.disarm()
                point = self._go_back(first)
        finally:
            backend.close()

    def _try(self, backend: Any, point: ResumePoint | None) -> RunResult:
        from chatlearn.engine.run import Run

        log = self._log
        log.progress.stage("starting workers")
        run: Run | None = None
        try:
            with Session.open(self._plan.config, self._plan, log.folder.path, backend) as session:
                self._watch.arm(session.loop)
                run = Run(self._engine, session, log, point, self._budget)
                self._reset(run, point)
                run.on_ready = lambda: self._record(point)
                return run.execute()
        except Exception as error:
            done = run.num_finished if run is not None else 0
            self._failure = (error, time.monotonic(), done)
            raise

    def _reset(self, run: Run, point: ResumePoint | None) -> None:
        """Let a try without a checkpoint begin as the first did: the sample manager has gone on."""
        if point is not None or run.rollout is None:
            return
        if self._beginning is None:
            self._beginning = run.rollout.state
        else:
            run.rollout.restore(self._beginning)

    def _go_back(self, first: ResumePoint | None) -> ResumePoint | None:
        """The point to go on from: this run's last good checkpoint, else where it began."""
        folder = self._log.folder.checkpoints_dir
        remove_drafts(folder)
        trained = self._plan.flows.trainable
        found = find_resume_point([folder], trained)
        for note in found.notes[:-1]:
            self._log.progress.message(note)
        point = found.point or first
        self._log.rewind(read_history(point.checkpoint) if point is not None else [])
        return point

    def _record(self, point: ResumePoint | None) -> None:
        """The run goes on after a failure: write down what that took."""
        if self._failure is None:
            return
        (error, failed_s, done), self._failure = self._failure, None
        worker = error if isinstance(error, WorkerError) else None
        since_s = point.state.created_s if point is not None else 0.0
        ran_s = failed_s - self._start_s
        saved_s = time.time() - since_s - (time.monotonic() - failed_s)
        self._budget.record(
            Recovery(
                time.time(),
                ROLL_BACK,
                str(error).partition("\n")[0],
                worker.model_name if worker is not None else "",
                worker.replica if worker is not None else 0,
                worker.rank if worker is not None else 0,
                max(0.0, min(ran_s, saved_s)),
                max(0, done - (point.state.episode if point is not None else 0)),
                0,
                time.monotonic() - failed_s,
            )
        )


def _create_backend(plan: RunPlan, log: RunLog) -> Any:
    if plan.config.runtime.backend == "local":
        from chatlearn.runtime.local_backend import LocalBackend

        return LocalBackend()
    from chatlearn.runtime.ray_backend import RayBackend

    return RayBackend(log.folder.logs_dir)
