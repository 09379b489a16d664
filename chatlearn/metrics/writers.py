"""Where metrics go: JSON lines, TensorBoard, and Weights & Biases where it is asked for."""

from __future__ import annotations

import importlib
import json
import math
from typing import TYPE_CHECKING, Any, Protocol

from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["JsonLinesWriter", "MetricLog", "MetricWriter", "TensorBoardWriter", "WandbWriter"]


class MetricWriter(Protocol):
    """One place where metrics go."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics."""
        ...

    def close(self) -> None:
        """Write what is left, and close."""
        ...


class JsonLinesWriter:
    """A JSON object per step: `step`, then the metrics by name, sorted."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a line and flush it; what is not finite becomes null."""
        # JSON has no NaN and no infinity.
        ordered = {
            name: metrics[name] if math.isfinite(metrics[name]) else None
            for name in sorted(metrics)
        }
        self._file.write(json.dumps({"step": step, **ordered}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard's event files, one scalar per metric."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the scalars of one step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the files."""
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

    def close(self) -> None:
        """Close every writer."""
        for writer in self._writers:
            writer.close()
        self._writers = []
