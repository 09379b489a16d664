"""Two Ray nodes on one machine, one of which is lost: killed, or cut off from the other.

To be cut off a node lives in a network namespace of its own, with one link to the head's address;
that needs the right to make one.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from scripts.faults.campaign import Campaign, Fault, Outcome, run_undisturbed
from scripts.faults.traces import MARK, find_processes
from scripts.faults.workload import write_workload

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["TwoNodes", "can_cut", "lose_nodes"]

ROOT = Path(__file__).resolve().parents[2]
_SPACE = "chatlearn-soak"
_LINK, _PEER = "clsoak0", "clsoak1"
_HEAD_IP, _PEER_IP = "10.77.31.1", "10.77.31.2"
_START_S = 60.0
_OPTIONS = ["--disable-usage-stats", "--object-store-memory=200000000", "--num-gpus=0"]


class TwoNodes:
    """A Ray cluster of a head and one more node, as children of this process.

    Args:
        folder: for the token and the logs.
        is_apart: the second node lives in a network namespace.
    """

    def __init__(self, folder: Path, *, is_apart: bool) -> None:
        self._folder = folder
        self._is_apart = is_apart
        self._num_nodes = 0
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        if is_apart:
            _build_space()
        host = _HEAD_IP if is_apart else socket.gethostbyname(socket.gethostname())
        self._address = f"{host}:{_free_port()}"
        self.environment = {
            "RAY_ADDRESS": self._address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "CHATLEARN_NUM_NODES": "2",
        }
        self._marks: list[str] = []
        port = self._address.rpartition(":")[2]
        self._start(["--head", f"--port={port}", "--include-dashboard=false"], host)
        _await_port(host, int(port))
        self.second = self._join(is_apart=is_apart)

    def lose(self) -> None:
        """Kill or cut off the second node; a new one joins, as a cluster's manager would see to."""
        if self._is_apart:
            _run("ip", "link", "set", _LINK, "down")
        else:
            _kill(self.second)
        self.second = self._join(is_apart=False)

    def close(self) -> None:
        """End every process of the cluster."""
        for mark in self._marks:
            _kill(mark)
        if self._is_apart:
            _remove_space()

    def _join(self, *, is_apart: bool) -> str:
        host = _PEER_IP if is_apart else self._address.partition(":")[0]
        return self._start([f"--address={self._address}"], host, is_apart=is_apart)

    def _start(self, arguments: list[str], host: str, *, is_apart: bool = False) -> str:
        mark = uuid.uuid4().hex
        self._marks.append(mark)
        self._num_nodes += 1
        prefix = ["ip", "netns", "exec", _SPACE] if is_apart else []
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        own = {key: value for key, value in self.environment.items() if key.startswith("RAY_AUTH")}
        with (self._folder / f"node-{self._num_nodes}.log").open("wb") as log:
            subprocess.Popen(
                [*prefix, *command, *arguments, f"--node-ip-address={host}", *_OPTIONS],
                env={**os.environ, **own, MARK: mark, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return mark


def lose_nodes(
    base: Path, count: int, limit_s: float, tell: Callable[[str], None]
) -> tuple[list[Outcome], list[str]]:
    """Lose a node `count` times, cut off every second time where that can be done.

    Returns:
        The outcomes, and what was left behind or differs from the undisturbed run.
    """
    reference = base / "nodes-undisturbed"
    config = write_workload(reference, 12, is_wide=True)
    expected = run_undisturbed(reference, config, uuid.uuid4().hex, 600.0)
    outcomes: list[Outcome] = []
    left: list[str] = []
    for number in range(count):
        is_apart = number % 2 == 1 and can_cut()
        folder = base / f"nodes-{number}"
        config = write_workload(folder, 12, is_wide=True, devices_per_node=4)
        nodes = TwoNodes(folder / "cluster", is_apart=is_apart)
        try:
            campaign = Campaign(
                folder,
                config,
                uuid.uuid4().hex,
                nodes.environment,
                limit_s + 120.0,
                {"node": nodes.lose},
            )
            kind = "cut off" if is_apart else "killed"
            (outcome,) = campaign.run([Fault("node", "node 1", kind)])
            outcomes.append(outcome)
            found = campaign.account()
            if found["trained"] != expected["trained"]:
                left.append(f"node {number}: the samples differ")
            left += campaign.find_leftovers()
            tell(f"node {number + 1} of {count}, {kind}: {outcome.outcome}")
        finally:
            nodes.close()
    return outcomes, left


def can_cut() -> bool:
    """Whether a network namespace can be made here."""
    try:
        _build_space()
    except (OSError, subprocess.SubprocessError):
        return False
    _remove_space()
    return True


def _build_space() -> None:
    _remove_space()
    _run("ip", "netns", "add", _SPACE)
    _run("ip", "link", "add", _LINK, "type", "veth", "peer", "name", _PEER)
    _run("ip", "link", "set", _PEER, "netns", _SPACE)
    _run("ip", "addr", "add", f"{_HEAD_IP}/24", "dev", _LINK)
    _run("ip", "link", "set", _LINK, "up")
    inside = ("ip", "netns", "exec", _SPACE, "ip")
    _run(*inside, "addr", "add", f"{_PEER_IP}/24", "dev", _PEER)
    _run(*inside, "link", "set", _PEER, "up")
    _run(*inside, "link", "set", "lo", "up")


def _remove_space() -> None:
    for command in (("ip", "link", "del", _LINK), ("ip", "netns", "del", _SPACE)):
        subprocess.run(command, capture_output=True, timeout=20, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, timeout=20, check=True)


def _kill(mark: str) -> None:
    """End every process of a node at once, as when its machine loses power."""
    for _ in range(3):
        for pid in find_processes(mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _await_port(host: str, port: int) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((host, port)) == 0:
                return
        time.sleep(0.2)
    raise TimeoutError(f"Ray's head does not listen on {host}:{port}")
