"""A checkpoint is a folder that is there as a whole or not at all.

Workers write their models into a draft folder; the driver adds the run's state and renames it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatlearn.errors import CheckpointError

__all__ = [
    "CheckpointDraft",
    "RunState",
    "begin_checkpoint",
    "find_checkpoints",
    "prune_checkpoints",
    "read_run_state",
]

_STATE_FILE = "run_state.json"
_NAME = re.compile(r"episode_(\d{6,})")


@dataclass(frozen=True)
class RunState:
    """Where a run stood when a checkpoint was written.

    Attributes:
        episode: episodes that were finished.
        train_iteration: global batches trained on.
        num_drawn: prompts drawn in all.
        positions: prompts drawn from each data set.
        seed: of the run.
    """

    episode: int
    train_iteration: int
    num_drawn: int
    positions: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class CheckpointDraft:
    """A checkpoint that is being written.

    Attributes:
        folder: where it is written now.
        final: where it will be.
    """

    folder: Path
    final: Path

    def model_folder(self, model_name: str) -> Path:
        """Where one model's files go."""
        return self.folder / "models" / model_name

    def commit(self, state: RunState) -> Path:
        """Add the run's state and make the checkpoint visible; gives its folder."""
        try:
            text = json.dumps(asdict(state), indent=1)
            (self.folder / _STATE_FILE).write_text(text, encoding="utf-8")
            if self.final.exists():
                shutil.rmtree(self.final)
            os.replace(self.folder, self.final)
        except OSError as error:
            raise CheckpointError(f"{self.final} cannot be written: {error.strerror}") from error
        return self.final


def begin_checkpoint(checkpoints_dir: Path, episode: int) -> CheckpointDraft:
    """An empty draft folder for the checkpoint after `episode` finished episodes."""
    final = checkpoints_dir / f"episode_{episode:06d}"
    folder = checkpoints_dir / f".{final.name}.partial"
    try:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "models").mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}") from error
    return CheckpointDraft(folder, final)


def find_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in checkpoints_dir.glob("episode_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("episode_")))


def prune_checkpoints(checkpoints_dir: Path, keep: int | None) -> list[Path]:
    """Remove the oldest checkpoints beyond `keep`; gives those that were removed."""
    if keep is None:
        return []
    removed = find_checkpoints(checkpoints_dir)[: -max(keep, 1)]
    for path in removed:
        shutil.rmtree(path)
    return removed


def read_run_state(checkpoint: Path) -> RunState:
    """The run's state in a checkpoint.

    Raises:
        CheckpointError: the file is missing or not what `commit` writes.
    """
    path = checkpoint / _STATE_FILE
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content["positions"] = tuple(content["positions"])
        return RunState(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
