"""Drafts of checkpoints that a process left behind, and whether anybody still writes them.

A run writes down beside its checkpoints which process writes them. Whoever starts after one that
was killed can so tell that a draft is nobody's any more, and remove it.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.checkpoint.background import write_aside

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Writer", "current_writer", "note_writer", "remove_dead_drafts", "remove_drafts"]

WRITER_FILE = ".writer.json"
_KINDS = ("partial", "removed")
_DAY_S = 24 * 3600.0
_MOST_PROCESSES = 1 << 31
# Of what `/proc/<process>/stat` has behind the name: the state, and when the process began.
_STATE, _START = 0, 19


@dataclass(frozen=True)
class Writer:
    """A process, so that no later one of the same number is taken for it.

    Attributes:
        host: name of its host.
        boot_id: of the host's system, since it was started.
        pid_namespace: in which its number counts; containers have their own.
        process_id: its number.
        start_ticks: when it began, in clock ticks since the system's start.
    """

    host: str
    boot_id: str
    pid_namespace: int
    process_id: int
    start_ticks: int


def current_writer() -> Writer:
    """This process."""
    return Writer(
        socket.gethostname(),
        Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
        os.stat("/proc/self/ns/pid").st_ino,
        os.getpid(),
        int(_read_stat(os.getpid())[_START]),
    )


def note_writer(checkpoints_dir: Path) -> None:
    """Write down that this process writes the checkpoints of this folder."""
    path, writer = checkpoints_dir / WRITER_FILE, current_writer()
    if _read_writer(path) != writer:
        write_aside(path, json.dumps(asdict(writer)))


def remove_drafts(checkpoints_dir: Path) -> None:
    """Remove what was being written, or removed, when its writer ended."""
    for left in _find_drafts(checkpoints_dir):
        shutil.rmtree(left, ignore_errors=True)


def remove_dead_drafts(folders: Sequence[Path]) -> list[Path]:
    """Remove what runs that have ended left half written; gives those that are gone.

    A draft stays while its writer lives, and where it wrote on another host. Where that cannot be
    told (no record, another container's process numbers), it stays until it is a day old.

    Args:
        folders: `checkpoints` folders of runs.
    """
    here = current_writer()
    dead = [
        draft
        for folder in folders
        for draft in _find_drafts(folder)
        if _is_dead(_read_writer(folder / WRITER_FILE), here, draft)
    ]
    for draft in dead:
        shutil.rmtree(draft, ignore_errors=True)
    return [draft for draft in dead if not draft.exists()]


def _find_drafts(checkpoints_dir: Path) -> list[Path]:
    found = (checkpoints_dir.glob(f".episode_*.{kind}") for kind in _KINDS)
    return sorted(path for paths in found for path in paths)


def _is_dead(writer: Writer | None, here: Writer, draft: Path) -> bool:
    if writer is not None and writer.host != here.host:
        return False
    changed_s = _last_change_s(draft)
    if writer is not None and writer.boot_id != here.boot_id:
        # Another host of the same name may write now; this one's earlier system cannot.
        return changed_s < time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    if writer is None or writer.pid_namespace != here.pid_namespace:
        return changed_s < time.time() - _DAY_S
    return not _is_alive(writer)


def _last_change_s(draft: Path) -> float:
    """When anything in a draft changed last; now, where it changes while that is read."""
    try:
        return max(path.lstat().st_mtime for path in (draft, *draft.rglob("*")))
    except OSError:
        return time.time()


def _is_alive(writer: Writer) -> bool:
    try:
        os.kill(writer.process_id, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # Another user's.
        pass
    try:
        values = _read_stat(writer.process_id)
    except OSError:
        # Some systems hide what others' processes do, or it has ended just now.
        return True
    return values[_STATE] not in "ZX" and int(values[_START]) == writer.start_ticks


def _read_stat(process_id: int) -> list[str]:
    """What the system says of a process, from its state on."""
    text = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace")
    # The name stands in brackets, and may hold brackets and spaces itself.
    return text.rpartition(")")[2].split()


def _read_writer(path: Path) -> Writer | None:
    """The record; None where there is none, or none of ours."""
    try:
        content = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        writer = Writer(
            str(content["host"]),
            str(content["boot_id"]),
            int(content["pid_namespace"]),
            int(content["process_id"]),
            int(content["start_ticks"]),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return writer if 0 < writer.process_id < _MOST_PROCESSES else None
