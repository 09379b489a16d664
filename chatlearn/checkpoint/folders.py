"""A checkpoint is a folder that is there as a whole or not at all.

Workers write their models into a draft folder; the driver adds the run's state and the manifest,
and makes it visible by one rename.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.checkpoint.drafts import note_writer
from chatlearn.checkpoint.manifest import (
    FileSum,
    list_files,
    sum_files,
    sync_folder,
    verify_checkpoint,
    write_manifest,
)
from chatlearn.checkpoint.run_state import RunState, read_run_state, write_run_state
from chatlearn.errors import CheckpointError, explain_unwritten

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = [
    "CheckpointDraft",
    "CheckpointSearch",
    "begin_checkpoint",
    "find_checkpoints",
    "find_damage",
    "find_newest",
    "prune_checkpoints",
]

_NAME = re.compile(r"episode_(\d{6,})")
_MOST_NAMED = 5


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

    @property
    def receipts(self) -> Path:
        """Where workers say that they have written their files; gone when it is committed."""
        return self.folder / ".receipts"

    def commit(self, state: RunState, known: Mapping[str, FileSum] | None = None) -> Path:
        """Add state and manifest, and make the checkpoint visible; gives its folder.

        Args:
            state: of the run.
            known: sums of files that are on the disk already, by relative path; the others are
                read here.

        Raises:
            CheckpointError: something cannot be written, or what was written is gone.
        """
        try:
            shutil.rmtree(self.receipts, ignore_errors=True)
            write_run_state(self.folder, state)
            names = list_files(self.folder)
            sums = dict(known or {})
            self._check(sums)
            unread = [name for name in names if name not in sums]
            write_manifest(self.folder, {**sums, **sum_files(self.folder, unread, is_synced=True)})
            sync_folder(self.folder)
            if self.final.exists():
                # It did not verify, or the run would not have come here again.
                _remove(self.final)
            os.replace(self.folder, self.final)
            sync_folder(self.final.parent)
        except OSError as error:
            raise CheckpointError(explain_unwritten(self.final, error)) from error
        return self.final

    def _check(self, known: Mapping[str, FileSum]) -> None:
        """See that files are as their writers left them, by their lengths."""
        missing: list[str] = []
        for name, written in sorted(known.items()):
            path = self.folder / name
            if not path.is_file():
                missing.append(name)
            elif path.stat().st_size != written.num_bytes:
                raise CheckpointError(
                    f"{self.final} cannot be written: {name} has {path.stat().st_size} bytes, its "
                    f"writer left {written.num_bytes}: does something else write to {self.folder}?"
                )
        if missing:
            shown = ", ".join(missing[:_MOST_NAMED])
            more = f" and {len(missing) - _MOST_NAMED} more" if missing[_MOST_NAMED:] else ""
            raise CheckpointError(
                f"{self.final} cannot be written: {shown}{more} had been written and is gone: does "
                f"something else remove files from {self.folder}, or do its nodes not share it?"
            )

    def discard(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def begin_checkpoint(checkpoints_dir: Path, episode: int) -> CheckpointDraft:
    """An empty draft folder for the checkpoint after `episode` finished episodes.

    Its name is its own: a writer of an earlier try may live on, on a node that is cut off.
    """
    final = checkpoints_dir / f"episode_{episode:06d}"
    folder = checkpoints_dir / f".{final.name}.{secrets.token_hex(4)}.partial"
    draft = CheckpointDraft(folder, final)
    try:
        for earlier in checkpoints_dir.glob(f".{final.name}.*partial"):
            shutil.rmtree(earlier, ignore_errors=True)
        (folder / "models").mkdir(parents=True)
        draft.receipts.mkdir()
        note_writer(checkpoints_dir)
    except OSError as error:
        raise CheckpointError(explain_unwritten(folder, error, "made")) from error
    return draft


def find_checkpoints(checkpoints_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first."""
    found = [path for path in checkpoints_dir.glob("episode_*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("episode_")))


def prune_checkpoints(
    checkpoints_dir: Path, keep: int | None, verified: set[Path] | None = None
) -> list[Path]:
    """Remove the oldest checkpoints beyond `keep`; gives those that were removed.

    Only checkpoints that are older than `keep` good ones go, so the newest good one stays
    whatever became of those after it.

    Args:
        checkpoints_dir: of the run.
        keep: how many good ones stay; None: all.
        verified: those that were read through before, of which only the lengths are looked at
            again; those that are read through now are added.
    """
    if keep is None:
        return []
    known: set[Path] = set() if verified is None else verified
    num_good = 0
    removed: list[Path] = []
    for path in reversed(find_checkpoints(checkpoints_dir)):
        if num_good >= keep:
            _remove(path)
            known.discard(path)
            removed.append(path)
        elif find_damage(path, is_quick=path in known) is None:
            known.add(path)
            num_good += 1
        else:
            known.discard(path)
    return removed[::-1]


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no part of it is ever taken for one."""
    doomed = checkpoint.with_name(f".{checkpoint.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed)


def find_damage(checkpoint: Path, *, is_quick: bool = False) -> str | None:
    """Why a checkpoint does not verify; None where it does; `is_quick` as `verify_checkpoint`."""
    try:
        verify_checkpoint(checkpoint, is_quick=is_quick)
        read_run_state(checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class CheckpointSearch:
    """What `find_newest` found.

    Attributes:
        checkpoint: the newest that verifies; None where there is none.
        skipped: newer ones, each with the reason.
    """

    checkpoint: Path | None
    skipped: tuple[tuple[Path, str], ...] = ()


def find_newest(folders: list[Path], trained: tuple[str, ...] | None = None) -> CheckpointSearch:
    """The newest checkpoint that verifies.

    Within a folder the later episode is the newer one, whatever the clock said; only checkpoints
    of different folders are compared by their times.

    Args:
        folders: `checkpoints` folders of runs.
        trained: names of the models that must be in it; None: any.
    """
    candidates = [entry for folder in folders for entry in _date(folder)]
    skipped: list[tuple[Path, str]] = []
    # The sort is stable, so equal times leave a folder's later episodes behind the earlier ones.
    for _, path in sorted(candidates, key=lambda entry: entry[0])[::-1]:
        reason = find_damage(path)
        if reason is None and trained is not None:
            saved = read_run_state(path).trained
            if set(saved) != set(trained):
                reason = f"it trains {', '.join(saved)}; this run trains {', '.join(trained)}"
        if reason is None:
            return CheckpointSearch(path, tuple(skipped))
        skipped.append((path, reason))
    return CheckpointSearch(None, tuple(skipped))


def _date(folder: Path) -> list[tuple[float, Path]]:
    """A folder's checkpoints, oldest first, each with a time that no earlier one exceeds."""
    dated: list[tuple[float, Path]] = []
    time_s = 0.0
    for path in find_checkpoints(folder):
        time_s = max(time_s, _written_s(path))
        dated.append((time_s, path))
    return dated


def _written_s(checkpoint: Path) -> float:
    """When it was written, from its state where that can be read."""
    try:
        return read_run_state(checkpoint).created_s
    except CheckpointError:
        pass
    try:
        return checkpoint.stat().st_mtime
    except OSError:
        # Another run has removed it meanwhile.
        return 0.0
