"""Where metrics go: JSON lines, TensorBoard, and Weights & Biases where it is asked for."""

from __future__ import annotations

import importlib
import json
import math
import os
from typing import TYPE_CHECKING, Any, Protocol

from chatlearn.errors import ConfigError
from chatlearn.metrics.unwritten import close_all, naming_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = [
    "JsonLinesWriter",
    "MetricLog",
    "MetricWriter",
    "TensorBoardWriter",
    "WandbWriter",
    "format_history",
]


class MetricWriter(Protocol):
    """One place where metrics go.

    What cannot be written is a `ChatLearnError` that names the place.
    """

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics."""
        ...

    def rewind(self, history: Sequence[Mapping[str, float]]) -> None:
        """Let only these steps have been written, each with its `step`."""
        ...

    def close(self) -> None:
        """Write what is left, and close."""
        ...


def format_line(step: int, metrics: Mapping[str, float]) -> str:
    """One step as a line of JSON, names sorted; what is not finite becomes null."""
    # JSON has no NaN and no infinity.
    ordered = {
        name: metrics[name] if math.isfinite(metrics[name]) else None for name in sorted(metrics)
    }
    return json.dumps({"step": step, **ordered}) + "\n"


def format_history(history: Sequence[Mapping[str, float]]) -> str:
    """Lines of several steps, each of which names its `step`."""
    return "".join(
        format_line(int(entry["step"]), {k: v for k, v in entry.items() if k != "step"})
        for entry in history
    )


class JsonLinesWriter:
    """A JSON object per step: `step`, then the metrics by name, sorted."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with naming_file(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line and flush it."""
        with naming_file(self._path):
            self._file.write(format_line(step, metrics))
            self._file.flush()

    def rewind(self, history: Sequence[Mapping[str, float]]) -> None:
        """Replace the file by one with these lines."""
        with naming_file(self._path):
            self._file.close()
            draft = self._path.with_suffix(".partial")
            draft.write_text(format_history(history), encoding="utf-8")
            os.replace(draft, self._path)
            self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        with naming_file(self._path):
            self._file.close()


class TensorBoardWriter:
    """TensorBoard's event files, one scalar per metric."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._build: Any = SummaryWriter
        self._folder = folder
        with naming_file(folder):
            self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the scalars of one step."""
        with naming_file(self._folder):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def rewind(self, history: Sequence[Mapping[str, float]]) -> None:
        """Begin anew: TensorBoard hides what an earlier file has from the first step on."""
        with naming_file(self._folder):
            self._writer.close()
            self._writer = self._build(str(self._folder), purge_step=0)
        for entry in history:
            self.write(int(entry["step"]), {k: v for k, v in entry.items() if k != "step"})

    def close(self) -> None:
        """Close the files."""
        with naming_file(self._folder):
            self._writer.close()


class WandbWriter:
    """Weights & Biases.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, project: str, name: str | None, folder: Path) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError(
                "runtime.enable_wandb: wandb is not installed: pip install wandb, or set it to "
                "false"
            ) from error
        self._run: Any = wandb.init(project=project, name=name, dir=str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one step."""
        self._run.log(dict(metrics), step=step)

    def rewind(self, history: Sequence[Mapping[str, float]]) -> None:
        """Nothing: what was logged there stays, and later steps go on from it."""

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


class MetricLog:
    """Writes every step to several places, and keeps what was written, `step` included."""

    def __init__(self, writers: list[MetricWriter]) -> None:
        self._writers = writers
        self.history: list[dict[str, float]] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step everywhere."""
        self.history.append({"step": float(step), **metrics})
        for writer in self._writers:
            writer.write(step, metrics)

    def rewind(self, history: Sequence[Mapping[str, float]]) -> None:
        """Let only these steps have been written."""
        self.history = [dict(entry) for entry in history]
        for writer in self._writers:
            writer.rewind(history)

    def close(self) -> None:
        """Close every writer."""
        writers, self._writers = self._writers, []
        close_all([writer.close for writer in writers])
