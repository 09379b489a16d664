"""Starts the processes that are measured and lets one work at a time, in turns."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

__all__ = ["BenchError", "Side", "SideSpec", "alternate", "start_sides"]

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 300.0
_ROUND_S = 1800.0
_END_S = 60.0
_TERMINATE_S = 20.0
_LOG_CHARACTERS = 3000


class BenchError(Exception):
    """A side did not start, died or did not answer; the text says which, with its last words."""


@dataclass(frozen=True)
class SideSpec:
    """One process to measure.

    Attributes:
        name: in tables.
        module: below `scripts.bench.sides`.
        options: given to it as JSON.
        python: its interpreter.
        num_threads: of torch, OpenMP and MKL.
    """

    name: str
    module: str
    options: Mapping[str, Any]
    python: str = sys.executable
    num_threads: int = 2


class Side:
    """A running process to measure; it sleeps between rounds.

    Attributes:
        name: in tables.
        hello: what it said when it was ready.
        process_id: root of its process tree.
    """

    def __init__(self, spec: SideSpec, folder: Path) -> None:
        self.name = spec.name
        self._is_working = False
        self._log = folder / "log.txt"
        address = str(folder / "gate")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(address)
            server.listen(1)
            server.settimeout(0.5)
            self._process = self._start(spec, address)
            self.process_id = self._process.pid
            try:
                self._socket = self._accept(server)
            except BaseException:
                self._kill()
                raise
        self._socket.settimeout(_START_S)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self.hello = self._read()
        self._socket.settimeout(_ROUND_S)

    def run(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Let it work once; gives its report.

        Raises:
            BenchError: it died, or said nothing for half an hour.
        """
        self._is_working = True
        self._send(order)
        report = self._read()
        self._is_working = False
        return report

    def close(self) -> None:
        """Let it end; it is killed if it does not, or if it is in the middle of a round."""
        try:
            if self._is_working:
                raise subprocess.TimeoutExpired("its round", 0.0)
            self._send({"stop": True})
            self._process.wait(_END_S)
        except (OSError, subprocess.TimeoutExpired):
            self._kill()
        self._lines.close()
        self._socket.close()

    def _start(self, spec: SideSpec, address: str) -> subprocess.Popen[bytes]:
        threads = str(spec.num_threads)
        environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "CUDA_VISIBLE_DEVICES": "",  # the sides are compared on the processor
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        module = f"scripts.bench.sides.{spec.module}"
        command = [spec.python, "-m", module, address, json.dumps(dict(spec.options))]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=_ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _accept(self, server: socket.socket) -> socket.socket:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise self._failure("ended before it was ready")
            try:
                return server.accept()[0]
            except TimeoutError:
                continue
        raise self._failure("was not ready in time")

    def _send(self, order: Mapping[str, Any]) -> None:
        self._socket.sendall(json.dumps(dict(order)).encode() + b"\n")

    def _read(self) -> dict[str, Any]:
        try:
            line = self._lines.readline()
        except TimeoutError:
            line = ""
        if not line:
            error = self._failure("died or did not answer")
            self._kill()
            raise error
        return json.loads(line)

    def _failure(self, what: str) -> BenchError:
        words = self._log.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:]
        return BenchError(f"{self.name} {what}; its last words:\n{words}")

    def _kill(self) -> None:
        # A run of this project ends its workers when it is asked to end.
        self._process.terminate()
        try:
            self._process.wait(_TERMINATE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def start_sides(specs: Sequence[SideSpec]) -> Generator[list[Side]]:
    """Start processes one after another; all end with the block."""
    sides: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as root:
        try:
            for number, spec in enumerate(specs):
                folder = Path(root, str(number))
                folder.mkdir()
                sides.append(Side(spec, folder))
            yield sides
        finally:
            for side in sides:
                side.close()


def alternate(
    sides: Sequence[Side],
    order: Mapping[str, Any],
    *,
    num_rounds: int,
    warmup: Mapping[str, Any],
) -> dict[str, list[dict[str, Any]]]:
    """Each side in turn, again and again; gives the reports by side, without the warm-up's.

    Args:
        sides: in the order of the turns.
        order: of each round.
        num_rounds: of each side.
        warmup: the order that comes first.
    """
    for side in sides:
        side.run(warmup)
    reports: dict[str, list[dict[str, Any]]] = {side.name: [] for side in sides}
    for _ in range(num_rounds):
        for side in sides:
            reports[side.name].append(side.run(order))
    return reports
