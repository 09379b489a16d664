"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PlainProgress", "ProgressDisplay", "TerminalProgress", "open_progress"]

_SHOWN = {
    "rollout/reward": "reward",
    "rollout/response_length": "length",
    "rollout/tokens_per_s": "tokens/s",
}
_SHOWN_ENDINGS = {"/kl": "kl", "/loss": "loss", "/clip_fraction": "clipped"}


class ProgressDisplay(Protocol):
    """Shows how a run goes."""

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """What is being done now, and how much of it is done."""
        ...

    def episode(self, episode: int, num_episodes: int, metrics: Mapping[str, float]) -> None:
        """An episode has ended."""
        ...

    def message(self, text: str) -> None:
        """A line that stays."""
        ...

    def close(self) -> None:
        """The run has ended."""
        ...


class PlainProgress:
    """One line per message and per episode; for files and CI."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._start_s = time.monotonic()

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Nothing: stages would flood a file."""

    def episode(self, episode: int, num_episodes: int, metrics: Mapping[str, float]) -> None:
        """One line with the metrics that matter most."""
        self.message(format_episode(episode, num_episodes, metrics))

    def message(self, text: str) -> None:
        """One line with the seconds since the start."""
        seconds = time.monotonic() - self._start_s
        self._stream.write(f"[{seconds:7.1f}s] {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is left to do."""


class TerminalProgress:
    """A line at the bottom that says what is being done, with the messages above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("starting", total=1)
        self._progress.start()

    def stage(self, text: str, done: int = 0, total: int = 0) -> None:
        """Show the stage in the bottom line."""
        self._progress.update(
            self._task, description=text, completed=done, total=max(total, done, 1)
        )

    def episode(self, episode: int, num_episodes: int, metrics: Mapping[str, float]) -> None:
        """One line above with the metrics that matter most."""
        self.message(format_episode(episode, num_episodes, metrics))

    def message(self, text: str) -> None:
        """A line above the bottom line."""
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Take the bottom line away."""
        self._progress.stop()


def open_progress() -> ProgressDisplay:
    """The display that suits standard error."""
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


def format_evaluation(metrics: Mapping[str, float]) -> list[str]:
    """What the evaluator computed, without what single models logged."""
    return [
        f"{name.replace('/', ' ')} {value:.4g}"
        for name, value in metrics.items()
        if name.startswith("eval/") and name.count("/") == 1
    ]


def format_episode(episode: int, num_episodes: int, metrics: Mapping[str, float]) -> str:
    """One line of an episode's metrics."""
    parts = [f"episode {episode + 1}/{num_episodes}"]
    for name, label in _SHOWN.items():
        if name in metrics:
            parts.append(f"{label} {metrics[name]:.4g}")
    parts.extend(format_evaluation(metrics))
    for name, value in metrics.items():
        for ending, label in _SHOWN_ENDINGS.items():
            if name.startswith("train/") and name.endswith(ending):
                parts.append(f"{name.split('/')[1]} {label} {value:.4g}")
    if "time/episode" in metrics:
        parts.append(f"{metrics['time/episode']:.1f} s")
    return "  ".join(parts)
