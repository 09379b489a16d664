"""This machine's part of a Ray cluster, as a child process that ends with its parent."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chatlearn.errors import PlacementError
from chatlearn.runtime.ray_cluster import choose_object_store

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["RayNode", "death_signal_setter", "start_child"]

_SET_PARENT_DEATH_SIGNAL = 1
_STOP_S = 20.0
_TAIL_LINES = 12
_LOOPBACK = ("127.", "0.0.0.0")  # noqa: S104 - compared with
# What torchrun and the scripts set for this process; Ray's workers must not take it for theirs.
_LAUNCH_NAMES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
    "ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK",
    "NUM_NODES", "CHATLEARN_PORT",
)  # fmt: skip


def start_child(
    command: Sequence[str], extra: dict[str, str], output: int | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in a group of its own, which gets SIGTERM when this process dies.

    Args:
        command: the command line.
        extra: environment variables besides those of this process, less the launcher's.
        output: file descriptor for its output; None: this process's.
    """
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCH_NAMES and not name.startswith("TORCHELASTIC_")
    }
    return subprocess.Popen(
        list(command),
        env=environment | extra,
        stdin=subprocess.DEVNULL if output is not None else None,
        stdout=output,
        stderr=output,
        process_group=0,
        preexec_fn=death_signal_setter(),
    )


class RayNode:
    """Runs `ray start --block`.

    Args:
        arguments: of `ray start`, besides those that every node gets and `$RAY_START_ARGS`.
        own_host: address of this machine that the others reach; loopback: Ray finds its own.
    """

    def __init__(self, arguments: Sequence[str], own_host: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="chatlearn-ray-"))
        self._log = self._folder / "ray-start.log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        command += ["--disable-usage-stats", *arguments, *_object_store_arguments()]
        if not own_host.startswith(_LOOPBACK):
            command.append(f"--node-ip-address={own_host}")
        command += shlex.split(os.environ.get("RAY_START_ARGS", ""))
        with self._log.open("wb") as log:
            self._process = start_child(command, {}, log.fileno())

    def is_running(self) -> bool:
        """Whether Ray's processes are there."""
        return self._process.poll() is None

    def failure(self) -> str:
        """How Ray ended, with its last words."""
        lines = self._log.read_text(errors="replace").strip().splitlines()[-_TAIL_LINES:]
        return "\n".join([f"Ray ended with exit code {self._process.returncode}:", *lines])

    def wait_port(self, port: int, timeout_s: float, check: Callable[[], None]) -> None:
        """Wait until Ray's head answers on this machine.

        Args:
            port: the head's port.
            timeout_s: limit of the wait.
            check: called again and again; raises to give up.

        Raises:
            PlacementError: Ray ended, or did not answer in time.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            check()
            if not self.is_running():
                raise PlacementError(self.failure())
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise PlacementError(f"Ray's head did not answer on port {port} within {timeout_s:g} s")

    def stop(self) -> None:
        """End Ray's processes of this node."""
        self._process.terminate()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def death_signal_setter() -> Callable[[], None]:
    """A function that lets the process that calls it get SIGTERM when its parent dies."""
    libc = ctypes.CDLL(None)

    def set_death_signal() -> None:
        libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)

    return set_death_signal


def _object_store_arguments() -> list[str]:
    shm = Path("/dev/shm")
    chosen = choose_object_store(shutil.disk_usage(shm).free if shm.exists() else 0)
    arguments = [f"--object-store-memory={chosen['object_store_memory']}"]
    if "_plasma_directory" in chosen:
        arguments.append(f"--plasma-directory={chosen['_plasma_directory']}")
    return arguments
