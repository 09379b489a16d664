"""The point between two episodes: what a checkpoint keeps of it, and how a run goes on from it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from chatlearn.checkpoint.plain_values import load_plain, save_plain
from chatlearn.checkpoint.run_state import RunState
from chatlearn.data.relay import EpisodeRelayBuffer
from chatlearn.data.rows import RowId
from chatlearn.data.sampler import SamplerState
from chatlearn.engine.checkpoints import CheckpointContent
from chatlearn.engine.resume import PARTIAL
from chatlearn.engine.rollout import RolloutState
from chatlearn.engine.worker_calls import load_stale, load_trained, load_worker, mark_start
from chatlearn.errors import ChatLearnError, CheckpointError, in_one_line
from chatlearn.metrics.writers import format_history

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatlearn.engine.resume import ResumePoint
    from chatlearn.engine.rollout import Rollout
    from chatlearn.engine.run import Run

__all__ = ["EpisodeBoundary"]

_RELAY_FILE = "relay.pt"


class EpisodeBoundary:
    """Saves the run as it stands between episodes, and puts it back there.

    Args:
        run: the loop.

    Attributes:
        is_trained: the current episode's training is over.
        is_synced: and its syncs.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._start: RolloutState | None = None
        self._start_updates = 0
        # Metrics of the current episode, once it is over.
        self._ended: Mapping[str, float] | None = None
        # Where the run can be gone on from as if it had not ended, by episodes that are over.
        self._exact: dict[int, Path] = {}
        self.is_trained = self.is_synced = False

    def mark(self, rollout: Rollout) -> None:
        """An episode begins: remember where everything stands."""
        run = self._run
        self._start, self._start_updates = rollout.state, run.session.num_updates
        self._ended = None
        self.is_trained = self.is_synced = False
        if run.session.plan.flows.trainable:
            run.session.call_all(mark_start)

    def end(self, metrics: Mapping[str, float]) -> None:
        """The episode is over, and counted; `metrics` are its own."""
        self._ended = metrics

    def save(self, metrics: Mapping[str, float], *, is_async: bool) -> None:
        """Save the end of the episode that is over; `metrics` are its own."""
        run = self._run
        history = [*run.log.metrics.history, {"step": float(run.num_finished), **metrics}]
        self._save_end(history, is_async=is_async)

    def save_again(self) -> None:
        """Save the end of the last episode, whose metrics are written already."""
        self._save_end(self._run.log.metrics.history, is_async=False)

    def save_after_signal(self) -> str:
        """Save what can be saved when the run is told to stop; gives words for the message.

        An episode that is over is saved as ever. Before an episode's first update that is its
        beginning, from which a run goes on as if nothing had happened. Later the episode cannot
        be repeated, since its trainers have gone on; it then counts as over, and the checkpoint is
        partial. In deterministic mode that is not saved where a run can go on exactly: from the
        last checkpoint, or, where they are made regularly, from the beginning.
        """
        run = self._run
        if not run.session.plan.flows.trainable or run.rollout is None or self._start is None:
            return ""
        run.session.loop.interrupt = None
        run.session.loop.detach_all()
        before = tuple(self._exact.values())
        try:
            saved = self._save_now(self._start, run.rollout)
        except ChatLearnError as error:
            return f"; nothing more could be saved: {in_one_line(error)}"
        if saved is None:
            return (
                "; nothing is saved: this episode has been trained on in part, and in "
                "deterministic mode a run goes on from where it is exact, which is its beginning"
            )
        if saved in before:
            return f"; the last checkpoint is {saved}"
        is_exact = saved in self._exact.values()
        return f"; saved {saved}{'' if is_exact else f', {PARTIAL}'}"

    def _save_now(self, start: RolloutState, rollout: Rollout) -> Path | None:
        run, now = self._run, self._run.num_finished
        run.checkpoints.finish()
        exact = {episode: path for episode, path in self._exact.items() if path.is_dir()}
        history = run.log.metrics.history
        if self._ended is not None:
            is_written = bool(history) and history[-1]["step"] == now
            if not is_written:
                run.log.write(now - 1, run.runtime.num_episode, self._ended)
            if now not in exact:
                self.save_again()
            return self._exact[now]
        is_start = run.session.num_updates == self._start_updates
        if is_start and now in exact:
            return exact[now]
        if run.runtime.deterministic and not is_start:
            if exact:
                return exact[max(exact)]
            if now == 0 or run.runtime.save_episode_interval:
                return None
        if is_start:
            return self._save(self._state(start), start, history, is_async=False, is_of_start=True)
        return self._save(self._partial_state(rollout), rollout.state, history, is_async=False)

    def load_models(self, resume: ResumePoint) -> None:
        """Give trainers, and models that a sync left behind, what the checkpoint has."""
        session, state, syncs = self._run.session, resume.state, self._run.syncs
        for name in state.trained:
            if name in session.groups:
                session.call_all(load_trained, resume.checkpoint, names=(name,))
        for name, version in state.versions.items():
            if name not in session.groups:
                continue
            if name in state.stale:
                session.call_all(load_stale, resume.checkpoint, version, names=(name,))
            syncs.note_version(name, version)
        syncs.version = max(0, state.version - 1)

    def restore(self, resume: ResumePoint, rollout: Rollout) -> None:
        """Put back everything else; call it last before the first episode."""
        run, state = self._run, resume.state
        run.num_finished = state.episode
        run.train_iteration = state.train_iteration
        kept, own = _read_relay(resume.checkpoint / _RELAY_FILE)
        sampler = SamplerState(state.num_drawn, state.positions)
        rollout.restore(RolloutState(sampler, state.lengths, kept, own))
        if not state.is_partial:
            self._exact[state.episode] = resume.checkpoint
        found = run.session.call_all(load_worker, resume.checkpoint)
        new = [name for name, answers in found.items() if not all(answers)]
        if new:
            run.log.progress.message(
                "the layout is another than the checkpoint's: random generators of "
                f"{', '.join(new)} start anew"
            )
        if state.seed != run.runtime.seed:
            run.log.progress.message(
                f"runtime.seed is {run.runtime.seed}, the checkpoint's was {state.seed}: what "
                "follows is not what would have followed"
            )

    def _state(self, rollout: RolloutState) -> RunState:
        run = self._run
        trained = run.session.plan.flows.trainable
        stale = tuple(name for name in run.syncs.stale if name not in trained)
        versions = run.syncs.versions
        return RunState(
            episode=run.num_finished,
            train_iteration=run.train_iteration,
            num_drawn=rollout.sampler.num_drawn,
            positions=rollout.sampler.positions,
            lengths=rollout.lengths,
            seed=run.runtime.seed,
            version=run.syncs.version,
            trained=trained,
            stale=stale,
            synced=tuple(versions),
            synced_versions=tuple(versions.values()),
        )

    def _partial_state(self, rollout: Rollout) -> RunState:
        """As if the episode were over: with its updates so far, and its syncs yet to come."""
        run = self._run
        state = self._state(rollout.state)
        updates = 0 if self.is_trained else run.session.num_updates - self._start_updates
        state = replace(
            state,
            episode=run.num_finished + 1,
            train_iteration=run.train_iteration + updates,
            is_partial=True,
        )
        if self.is_synced:
            return state
        # A run that goes on begins with a sync of all that are not stale.
        due = [name for name in state.synced if run.syncs.is_due(name, run.num_finished)]
        versions = {**state.versions, **dict.fromkeys(due, state.version)}
        return replace(
            state,
            version=state.version + 1,
            stale=tuple(name for name in state.stale if name not in due),
            synced_versions=tuple(versions.values()),
        )

    def _save_end(self, history: list[dict[str, float]], *, is_async: bool) -> None:
        rollout = self._run.rollout
        state = rollout.state if rollout is not None else self._start
        if state is not None:
            self._save(self._state(state), state, history, is_async=is_async)

    def _save(
        self,
        state: RunState,
        rollout: RolloutState,
        history: list[dict[str, float]],
        *,
        is_async: bool,
        is_of_start: bool = False,
    ) -> Path:
        def write_extra(folder: Path) -> None:
            content = {
                "episodes": [[each.episode_id, each.buffer] for each in rollout.relay],
                "manager": dict(rollout.manager),
            }
            save_plain(folder / _RELAY_FILE, content, "a sample manager's rows")

        metrics = format_history(history)
        content = CheckpointContent(state, metrics, write_extra, is_of_start)
        path = self._run.checkpoints.save(content, is_async=is_async)
        if not state.is_partial:
            self._exact[state.episode] = path
        return path


def _read_relay(path: Path) -> tuple[tuple[EpisodeRelayBuffer, ...], Mapping[str, Any]]:
    """The kept episodes, and the sample manager's own state."""
    content = load_plain(path)
    try:
        episodes = tuple(
            EpisodeRelayBuffer(int(number), [_with_row_id(row) for row in rows])
            for number, rows in content["episodes"]
        )
        return episodes, cast("Mapping[str, Any]", content["manager"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold kept episodes: {error}") from error


def _with_row_id(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "row_id": RowId(*row["row_id"])} if "row_id" in row else row
