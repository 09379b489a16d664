"""Processes and shared memory that a run may leave behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

__all__ = ["MARK", "await_silence", "find_processes", "kill_marked", "shared_memory"]

MARK = "CHATLEARN_SOAK_MARK"


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


def await_silence(mark: str, timeout_s: float) -> list[str]:
    """Wait until no process has the mark; gives those that are still there then."""
    deadline = time.monotonic() + timeout_s
    while left := find_processes(mark):
        if time.monotonic() > deadline:
            return [f"{pid}: {command}" for pid, command in left.items()]
        time.sleep(0.2)
    return []


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
