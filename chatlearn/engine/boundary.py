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
from chatlearn.engine.rollout import RolloutState
from chatlearn.engine.worker_calls import load_model, load_worker, mark_start
from chatlearn.errors import CheckpointError
from chatlearn.metrics.writers import format_history

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chatlearn.engine.resume import ResumePoint
    from chatlearn.engine.rollout import Rollout
    from chatlearn.engine.run import Run

__all__ = ["EpisodeBoundary"]

_RELAY_FILE = "relay.pt"
_NOWHERE = SamplerState(0, ())


class EpisodeBoundary:
    """Saves the run as it stands between episodes, and puts it back there.

    Args:
        run: the loop.

    Attributes:
        is_trained: the current episode's training and syncs are over.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._start = RolloutState(_NOWHERE, ())
        self._start_updates = 0
        self._saved_episode = -1
        self.is_trained = False

    def mark(self, rollout: Rollout) -> None:
        """An episode begins: remember where everything stands."""
        run = self._run
        self._start, self._start_updates = rollout.state, run.session.num_updates
        self.is_trained = False
        if run.session.plan.flows.trainable:
            run.session.call_all(mark_start)

    def save(self, metrics: Mapping[str, float], *, is_async: bool) -> None:
        """Save the end of the episode that is over; `metrics` are its own."""
        run = self._run
        history = [*run.log.metrics.history, {"step": float(run.num_finished), **metrics}]
        rollout = run.rollout.state if run.rollout is not None else self._start
        self._save(self._state(rollout), rollout, history, is_async=is_async)

    def save_after_signal(self) -> str:
        """Save what can be saved when the run is told to stop; gives words for the message.

        Before the episode's first update that is its beginning, from which a run goes on as if
        nothing had happened. Later the episode cannot be repeated, since its trainers have gone
        on; it then counts as over. In deterministic mode that is not saved beside an exact one.
        """
        run = self._run
        if not run.session.plan.flows.trainable or run.rollout is None:
            return ""
        run.session.loop.interrupt = None
        run.session.loop.detach_all()
        run.checkpoints.finish()
        is_start = run.session.num_updates == self._start_updates
        has_this = is_start and self._saved_episode == run.num_finished
        has_exact = run.runtime.deterministic and not is_start and self._saved_episode >= 0
        if has_this or has_exact:
            name = f"episode_{self._saved_episode:06d}"
            return f"; the last checkpoint is {run.log.folder.checkpoints_dir / name}"
        rollout = self._start if is_start else run.rollout.state
        state = self._state(rollout)
        if not is_start:
            state = replace(state, episode=run.num_finished + 1, is_partial=not self.is_trained)
        history = run.log.metrics.history
        path = self._save(state, rollout, history, is_async=False, is_of_start=is_start)
        return f"; saved {path}"

    def load_models(self, resume: ResumePoint) -> None:
        """Give trainers, and models that a sync left behind, what the checkpoint has."""
        session = self._run.session
        for name in (*resume.state.trained, *resume.state.stale):
            if name in session.groups:
                is_trained = name in resume.state.trained
                session.call_all(load_model, resume.checkpoint, is_trained, names=(name,))
        self._run.syncs.version = max(0, resume.state.version - 1)

    def restore(self, resume: ResumePoint, rollout: Rollout) -> None:
        """Put back everything else; call it last before the first episode."""
        run, state = self._run, resume.state
        run.num_finished = state.episode
        run.train_iteration = state.train_iteration
        kept, own = _read_relay(resume.checkpoint / _RELAY_FILE)
        sampler = SamplerState(state.num_drawn, state.positions)
        rollout.restore(RolloutState(sampler, state.lengths, kept, own))
        self._start, self._saved_episode = rollout.state, -1
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
        return RunState(
            episode=run.num_finished,
            train_iteration=run.train_iteration,
            num_drawn=rollout.sampler.num_drawn,
            positions=rollout.sampler.positions,
            lengths=rollout.lengths,
            seed=run.runtime.seed,
            version=run.syncs.version,
            trained=trained,
            stale=tuple(name for name in run.syncs.stale if name not in trained),
        )

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
        self._saved_episode = state.episode
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
