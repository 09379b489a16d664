"""A run is a folder: config, metrics, TensorBoard, timeline, checkpoints, logs."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from chatlearn.config.checks import find_bad_folder_name
from chatlearn.errors import ConfigError

__all__ = ["RunFolder"]


@dataclass(frozen=True)
class RunFolder:
    """Paths within one run's folder."""

    path: Path

    @classmethod
    def create(cls, output_dir: str, exp_name: str, config_text: str) -> RunFolder:
        """Make `{output_dir}/{exp_name}/{UTC time}/` and write the resolved config into it.

        Raises:
            ConfigError: `exp_name` is no plain folder name, or the folder cannot be made.
        """
        problem = find_bad_folder_name(exp_name)
        if problem:
            raise ConfigError(f"runtime.exp_name: {problem}")
        parent = Path(output_dir) / exp_name
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        try:
            folder = _make_unique(parent, stamp)
            for name in ("checkpoints", "logs", "tensorboard"):
                (folder / name).mkdir()
            (folder / "config.yaml").write_text(config_text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"runtime.output_dir: {parent}: {error.strerror or error}") from error
        except ValueError as error:
            raise ConfigError(f"runtime.output_dir: {str(parent)!r}: {error}") from error
        return cls(folder.resolve())

    @property
    def metrics_file(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def timeline_file(self) -> Path:
        """Chrome trace format."""
        return self.path / "timeline.json"

    @property
    def tensorboard_dir(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints_dir(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    @property
    def profile_dir(self) -> Path:
        """Kernel timelines, where an episode was profiled."""
        return self.path / "profile"

    @property
    def logs_dir(self) -> Path:
        """One file per worker."""
        return self.path / "logs"


def _make_unique(parent: Path, stamp: str) -> Path:
    """A new folder; a number is appended where two runs start within one second."""
    parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = parent / (stamp if number == 0 else f"{stamp}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
            continue
        return folder
