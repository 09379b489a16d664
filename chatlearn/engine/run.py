"""One run of an engine, from the first worker to the last metric: the loop."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from chatlearn.engine.attempts import Attempts
from chatlearn.engine.boundary import EpisodeBoundary
from chatlearn.engine.checkpoints import Checkpoints
from chatlearn.engine.episode_metrics import average_workers, summarize_records, wall_seconds
from chatlearn.engine.evaluation import Evaluation, run_evaluation
from chatlearn.engine.overhead import build_meter
from chatlearn.engine.profile import EpisodeProfile
from chatlearn.engine.prompts import PromptSource
from chatlearn.engine.recovery import RecoveryBudget, ReplicaRecovery
from chatlearn.engine.result import RunResult
from chatlearn.engine.resume import choose_resume_point, clear_dead_drafts, read_history
from chatlearn.engine.reward_guard import may_train
from chatlearn.engine.rollout import Rollout
from chatlearn.engine.run_log import RunLog
from chatlearn.engine.sigterm import SigtermWatch, Terminated
from chatlearn.engine.syncs import WeightSyncs
from chatlearn.engine.training import train_on_samples
from chatlearn.errors import ConfigError, DataError, WaitTimeoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chatlearn.config import Config
    from chatlearn.engine.engine import Engine
    from chatlearn.engine.resume import ResumePoint
    from chatlearn.engine.session import Session
    from chatlearn.flow.execute import StageRecord
    from chatlearn.sync.synchronizer import SyncReport

__all__ = ["Run", "Terminated", "run_engine"]

logger = logging.getLogger(__name__)


def run_engine(engine: Engine, config: Config) -> RunResult:
    """Run every episode; all workers are gone when this returns or raises.

    Raises:
        ConfigError: flows and config do not fit; nothing was started.
        DataError: there is no data set where one is needed.
        Terminated: SIGTERM.
    """
    with SigtermWatch() as watch:
        plan = engine.plan(config)
        config = plan.config
        if plan.missing_files:
            raise ConfigError("\n  ".join(["files are missing:", *plan.missing_files]))
        if (engine.environment or engine.trainer) and not engine.datasets:
            raise DataError(
                "the engine has no data set: call set_dataset(prompts), or set data_path"
            )
        found = choose_resume_point(config.runtime, plan.flows.trainable)
        removed = clear_dead_drafts(config.runtime)
        with RunLog.open(config) as log:
            for note in (*plan.notes, *removed, *found.notes):
                log.progress.message(note)
            if found.point is not None:
                log.rewind(read_history(found.point.checkpoint))
            return Attempts(engine, plan, log, watch).run(found.point)


class Run:
    """The state of the loop.

    Args:
        engine: what runs.
        session: its workers.
        log: what it leaves behind.
        resume: the checkpoint to go on from; None: from the beginning.
        budget: how often it may recover from dead workers.
    """

    def __init__(
        self,
        engine: Engine,
        session: Session,
        log: RunLog,
        resume: ResumePoint | None,
        budget: RecoveryBudget,
    ) -> None:
        self.engine = engine
        self.session = session
        self.log = log
        self.runtime = session.config.runtime
        self.resume = resume
        self.evaluation: Evaluation | None = None
        self.rollouts: list[dict[str, Any]] = []
        self.train_iteration = 0
        self.num_finished = 0
        self.on_ready: Callable[[], None] = lambda: None
        self.start_metrics: dict[str, float] = {}
        self.syncs = WeightSyncs(session, self._add_sync, self._tell_sync)
        self.eval_prompts = self._build_eval_prompts()
        self.rollout = Rollout(engine, session, log) if engine.datasets_needed else None
        self.overhead = build_meter(session, has_manager=engine.sample_manager is not None)
        self.profile = EpisodeProfile(session, log.folder.profile_dir)
        self.checkpoints = Checkpoints(session, log.folder.checkpoints_dir)
        self.boundary = EpisodeBoundary(self)
        session.loop.recover = ReplicaRecovery(session, self.syncs, budget).recover

    def execute(self) -> RunResult:
        """Every episode, one after another."""
        try:
            self._run_episodes()
            self.checkpoints.finish()
            if self.checkpoints.is_lost:
                self.boundary.save_again()
        except WaitTimeoutError as error:
            self.session.explain(error)
            raise
        except Terminated as stop:
            raise Terminated(f"{stop}{self.boundary.save_after_signal()}") from None
        finally:
            self.checkpoints.give_up()
            self.syncs.close()
        rows = self.evaluation.rows if self.evaluation is not None else {}
        return RunResult(self.log.folder.path, self.rollouts, rows, self.log.metrics.history)

    def _run_episodes(self) -> None:
        if self.resume is not None:
            self.boundary.load_models(self.resume)
        synced = self.syncs.synchronize(None, self.resume.state.stale if self.resume else ())
        if self.resume is None:
            # With the first numbers that are written, under names of their own.
            self.start_metrics = {f"{name}_at_start": value for name, value in synced.items()}
        if self.rollout is None:
            self.on_ready()
            self.profile.start(0)
            self.log.write(0, 1, {**self._take_start_metrics(), **self._evaluate(episode=0)})
            self.profile.finish(0)
            return
        if self.resume is not None:
            self.boundary.restore(self.resume, self.rollout)
        elif self.runtime.enable_eval_before_training and self.eval_prompts is not None:
            metrics = {**self._take_start_metrics(), **self._evaluate(episode=0)}
            self.log.write_extra(0, metrics)
        self.overhead.finish(time.time())
        self.on_ready()
        for episode in range(self.num_finished, self.runtime.num_episode):
            self._run_episode(self.rollout, episode)

    def _may_train(self, rollout: Rollout) -> bool:
        log = self.log
        return may_train(self.runtime.guards, rollout, log.metrics.history, log.folder.path)

    def _take_start_metrics(self) -> dict[str, float]:
        taken, self.start_metrics = self.start_metrics, {}
        return taken

    def _run_episode(self, rollout: Rollout, episode: int) -> None:
        start_s = time.monotonic()
        self.profile.start(episode)
        self.boundary.mark(rollout)
        self.session.start_episode()
        samples = rollout.start(episode)
        metrics = self._take_start_metrics()
        if self.engine.trainer is None:
            rollout.finish()
            self.rollouts = rollout.fetch_rows()
        elif not self._may_train(rollout):
            metrics["skipped_episode"] = 1.0
        else:
            records = train_on_samples(self.session, rollout, samples, self.train_iteration)
            self.train_iteration += records.num_batches
            self.boundary.is_trained = True
            metrics.update(summarize_records(records.records, "train"))
            self._add_calls(records.records)
        rollout.finish()
        metrics.update(rollout.metrics())
        self._add_calls(rollout.records)
        metrics.update(self.syncs.synchronize(episode))
        self.boundary.is_synced = True
        if self._is_evaluated(episode):
            metrics.update(self._evaluate(episode + 1))
        metrics.update(average_workers(self.session.finish_episode(), "episode"))
        self.num_finished = episode + 1
        self.boundary.end(metrics)
        metrics.update(self._save(metrics))
        metrics["time/episode"] = time.monotonic() - start_s
        metrics.update(self.overhead.finish(time.time()))
        if self.profile.finish(episode):
            # Writing it is no part of the next episode.
            self.overhead.finish(time.time())
        self.log.write(episode, self.runtime.num_episode, metrics)

    def _add_calls(self, records: Sequence[StageRecord]) -> None:
        """Put finished calls on the timeline, and into the account of the workers' time."""
        self.log.add_spans(records)
        self.overhead.add_calls(records)

    def _tell_sync(self, destination: str) -> None:
        self.log.progress.stage(f"syncing weights to {destination}")

    def _add_sync(self, pair: tuple[str, str], report: SyncReport) -> None:
        self.log.timeline.add("sync", pair[1], report.start_s, report.end_s)
        self.overhead.add_models(report.start_s, report.end_s, pair)

    def _evaluate(self, episode: int) -> dict[str, float]:
        evaluator = self.engine.evaluator
        if evaluator is None or self.eval_prompts is None:
            raise DataError("there is nothing to do: no training, and no evaluation data set")
        self.log.progress.stage("evaluating", 0, sum(self.eval_prompts.lengths))
        info = {"episode_iteration": episode, "train_iteration": self.train_iteration}
        self.evaluation = run_evaluation(self.session, evaluator, self.eval_prompts, info)
        self._add_calls(self.evaluation.records)
        metrics = summarize_records(self.evaluation.records, "eval")
        metrics.update({f"eval/{name}": v for name, v in self.evaluation.metrics.items()})
        metrics["time/eval"] = wall_seconds(self.evaluation.records)
        return metrics

    def _is_evaluated(self, episode: int) -> bool:
        if self.eval_prompts is None:
            return False
        interval = self.runtime.eval_episode_interval
        if interval is None:
            return episode + 1 == self.runtime.num_episode
        return interval > 0 and (episode + 1) % interval == 0

    def _save(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Save the episode that has just ended, if it is its turn; its metrics go along."""
        self.checkpoints.check()
        interval = self.runtime.save_episode_interval
        is_turn = interval is not None and self.num_finished % interval == 0
        if not is_turn and not self.checkpoints.is_lost:
            return {}
        start_s = time.time()
        self.log.progress.stage("saving")
        self.boundary.save(metrics, is_async=self.runtime.async_save)
        end_s = time.time()
        self.overhead.add_models(start_s, end_s, self.session.plan.flows.trainable)
        return {"time/save": end_s - start_s}

    def _build_eval_prompts(self) -> PromptSource | None:
        graph = self.session.plan.flows.evaluator
        evaluator = self.engine.evaluator
        if graph is None or evaluator is None:
            return None
        datasets = self.engine.eval_datasets
        if not datasets:
            if not self.engine.datasets_needed:
                raise DataError("the evaluator has no data set: call set_dataset(prompts)")
            logger.warning("the evaluator has no data set: nothing is evaluated")
            return None
        first = graph.nodes[0].model_name
        source = PromptSource(self.session, first, "eval", datasets, is_eval=True)
        self.log.tell_dropped("eval", source.num_dropped, sum(source.lengths))
        return source
