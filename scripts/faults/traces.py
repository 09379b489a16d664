"""Processes and shared memory that a run may leave behind."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MARK",
    "Silence",
    "await_end",
    "await_silence",
    "find_processes",
    "kill_marked",
    "shared_memory",
]

MARK = "CHATLEARN_SOAK_MARK"


@dataclass(frozen=True)
class Silence:
    """How the processes with a mark ended.

    Attributes:
        left: those that are still there, by number and command line.
        waited_s: how long that was waited for.
    """

    left: tuple[str, ...]
    waited_s: float


def find_processes(mark: str) -> dict[int, str]:
    """Processes whose environment holds the mark, with their command lines."""
    wanted = f"{MARK}={mark}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(entry.name)] = command.decode(errors="replace")[:120]
        except (OSError, IndexError):
            continue
    return found


def await_silence(mark: str, timeout_s: float) -> Silence:
    """Wait until no process has the mark."""
    return await_end(lambda: find_processes(mark), timeout_s)


def await_end(find: Callable[[], dict[int, str]], timeout_s: float) -> Silence:
    """Wait until no process is found, which are given by number with their command lines."""
    start_s = time.monotonic()
    while left := find():
        if time.monotonic() > start_s + timeout_s:
            found = tuple(f"{pid}: {command}" for pid, command in left.items())
            return Silence(found, time.monotonic() - start_s)
        time.sleep(0.2)
    return Silence((), time.monotonic() - start_s)


def kill_marked(mark: str) -> None:
    """End every process with the mark."""
    for pid in find_processes(mark):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm"))
