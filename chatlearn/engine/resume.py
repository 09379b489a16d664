"""Where a run goes on from: the checkpoint that the config names, or the newest good one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.checkpoint.drafts import remove_dead_drafts
from chatlearn.checkpoint.folders import find_newest
from chatlearn.checkpoint.manifest import verify_checkpoint
from chatlearn.checkpoint.run_state import RunState, read_run_state
from chatlearn.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from chatlearn.config import RuntimeConfig

__all__ = [
    "PARTIAL",
    "ResumePoint",
    "choose_resume_point",
    "clear_dead_drafts",
    "find_resume_point",
    "read_history",
]

AUTO = "auto"
PARTIAL = "partial: its last episode was cut short, and counts as over"


@dataclass(frozen=True)
class ResumePoint:
    """A verified checkpoint to go on from.

    Attributes:
        checkpoint: its folder.
        state: of the run that wrote it.
    """

    checkpoint: Path
    state: RunState


@dataclass(frozen=True)
class FoundPoint:
    """What `find_resume_point` found: a point, if any, and what a person should know."""

    point: ResumePoint | None
    notes: tuple[str, ...]


def choose_resume_point(runtime: RuntimeConfig, trained: tuple[str, ...]) -> FoundPoint:
    """What `runtime.resume` names, before the run has a folder.

    Raises:
        ConfigError: there is nothing to resume where it names a checkpoint.
    """
    if runtime.resume is None:
        return FoundPoint(None, ())
    if runtime.resume == AUTO:
        return find_resume_point(_find_folders(runtime), trained)
    path = Path(runtime.resume)
    try:
        verify_checkpoint(path)
        point = ResumePoint(path.resolve(), read_run_state(path))
    except CheckpointError as error:
        raise ConfigError(f"runtime.resume: {error}") from error
    if set(point.state.trained) != set(trained):
        raise ConfigError(
            f"runtime.resume: {path} trains {', '.join(point.state.trained) or 'nothing'}; this "
            f"run trains {', '.join(trained) or 'nothing'}"
        )
    return FoundPoint(point, (_tell(point),))


def clear_dead_drafts(runtime: RuntimeConfig) -> tuple[str, ...]:
    """With `runtime.resume: auto`, remove what dead runs of this `exp_name` left half written.

    Call it before the run has a folder: where the disk is full that makes room for it.

    Returns:
        What was removed, in lines for a person.
    """
    if runtime.resume != AUTO:
        return ()
    gone = remove_dead_drafts(_find_folders(runtime))
    return tuple(f"removed {path}, which a run that has ended left half written" for path in gone)


def _find_folders(runtime: RuntimeConfig) -> list[Path]:
    """The `checkpoints` folders of the runs of this `exp_name`."""
    runs = Path(runtime.output_dir) / runtime.exp_name
    return sorted(runs.glob("*/checkpoints")) if runs.is_dir() else []


def find_resume_point(folders: list[Path], trained: tuple[str, ...]) -> FoundPoint:
    """The newest checkpoint that verifies among those in `folders`."""
    found = find_newest(folders, trained)
    notes = [f"skipped checkpoint {path}: {reason}" for path, reason in found.skipped]
    if found.checkpoint is None:
        notes.append("no checkpoint to resume from: starting anew")
        return FoundPoint(None, tuple(notes))
    path = found.checkpoint.resolve()
    point = ResumePoint(path, read_run_state(path))
    notes.append(_tell(point))
    return FoundPoint(point, tuple(notes))


def _tell(point: ResumePoint) -> str:
    partial = f" ({PARTIAL})" if point.state.is_partial else ""
    return f"resuming {point.checkpoint} after episode {point.state.episode}{partial}"


def read_history(checkpoint: Path) -> list[dict[str, float]]:
    """The metrics of the episodes before a checkpoint.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = checkpoint / "metrics.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        entries = [cast("dict[str, Any]", json.loads(line)) for line in lines if line]
        return [
            {name: float("nan") if value is None else float(value) for name, value in entry.items()}
            for entry in entries
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
