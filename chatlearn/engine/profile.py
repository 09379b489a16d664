"""The profile of one episode: every worker's kernel timeline, and a summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlearn.metrics.profiling import StageProfiler, format_profiles

if TYPE_CHECKING:
    from pathlib import Path

    from chatlearn.engine.session import Session
    from chatlearn.metrics.profiling import StageProfile
    from chatlearn.parallel.context import WorkerContext

__all__ = ["EpisodeProfile", "finish_profile", "start_profile"]


def start_profile(context: WorkerContext) -> None:
    """Profile this worker's stages from now on."""
    context.profiler = StageProfiler(has_gpu=context.device.type == "cuda")


def finish_profile(context: WorkerContext, folder: Path) -> tuple[StageProfile, ...]:
    """Write this worker's trace, and give its stages."""
    profiler, context.profiler = context.profiler, None
    if not isinstance(profiler, StageProfiler):
        return ()
    rank = context.replica * context.layout.world_size + context.rank
    return profiler.finish(folder / f"{context.model_name}.{rank}.json")


class EpisodeProfile:
    """Profiles the one episode that the config names; by default the second.

    Args:
        session: the run.
        folder: where traces and summary go.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        runtime = session.config.runtime
        self._session = session
        self._folder = folder
        # Counted from 0.
        chosen = (runtime.profile_episode or min(2, runtime.num_episode)) - 1
        self._episode = chosen if runtime.profile else None

    def start(self, episode: int) -> None:
        """An episode begins."""
        if episode == self._episode:
            self._session.call_all(start_profile)

    def finish(self, episode: int) -> bool:
        """An episode has ended; gives whether it was profiled. Writes traces and `summary.txt`."""
        if episode != self._episode:
            return False
        found = self._session.call_all(finish_profile, self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        text = format_profiles(found)
        (self._folder / "summary.txt").write_text(text, encoding="utf-8")
        return True
