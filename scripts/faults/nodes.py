"""Two Ray nodes on one machine, one of which is lost: killed, or cut off from the other.

To be cut off a node lives in a network namespace of its own, with one link to the head's address;
that needs the right to make one.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.faults.campaign import SOON_S, Account, Campaign, Fault, Report, run_undisturbed
from scripts.faults.traces import MARK, Silence, await_end, find_processes
from scripts.faults.workload import FAULTS, write_workload

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NodeLoss", "TwoNodes", "can_cut", "lose_nodes", "plan_losses"]

ROOT = Path(__file__).resolve().parents[2]
_SPACE = "chatlearn-soak"
_LINK, _PEER = "clsoak0", "clsoak1"
_HEAD_IP, _PEER_IP = "10.77.31.1", "10.77.31.2"
_START_S = 60.0
_REJOIN_S = 120.0
_SILENCE_S = 120.0
# The agents of a node that is cut off notice that by themselves, in four minutes or so.
_SILENCE_APART_S = 360.0
_NUM_EPISODES = 10
_WORKER = re.compile(r"ray::(?!IDLE|\w+Agent)")
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
            self.cut()
        else:
            _kill(self.second)
        self.second = self._join(is_apart=False)

    def cut(self) -> None:
        """Cut off the second node, which lives apart."""
        _run("ip", "link", "set", _LINK, "down")

    def await_workers_end(self) -> Silence:
        """Until no worker of a run is left on any node, also on those that were lost."""
        return await_end(self._find_workers, _SILENCE_APART_S if self._is_apart else _SILENCE_S)

    def _find_workers(self) -> dict[int, str]:
        everyone = [item for mark in self._marks for item in find_processes(mark).items()]
        # Ray keeps idle workers at hand, and agents of each node.
        return {pid: command for pid, command in everyone if _WORKER.match(command)}

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


@dataclass(frozen=True)
class NodeLoss:
    """One loss of a node.

    Attributes:
        stage: that a worker of the node is in.
        moment: of the stage, as of a `Fault`.
        is_cut: the node is cut off, not killed.
    """

    stage: str
    moment: str
    is_cut: bool


def plan_losses(count: int, seed: int, *, has_spaces: bool) -> list[NodeLoss]:
    """A schedule: every stage in turn, in an order by lot; every second node is cut off.

    Args:
        count: losses.
        seed: of the lots.
        has_spaces: nodes can be cut off here.
    """
    lots = random.Random(seed)
    stages = list(dict.fromkeys(stage for own in FAULTS.values() for stage in own))
    losses: list[NodeLoss] = []
    while len(losses) < count:
        # Another kind of loss for each stage the next time.
        turn = seed + len(losses) // len(stages)
        lots.shuffle(stages)
        for number, stage in enumerate(stages):
            moment = "writing" if stage == "saving" and turn % 2 == 0 else ""
            losses.append(NodeLoss(stage, moment, has_spaces and (number + turn) % 2 == 1))
    return losses[:count]


def lose_nodes(
    base: Path, count: int, seed: int, limit_s: float, tell: Callable[[str], None]
) -> Report:
    """Lose a node `count` times, each time in a run of its own, at a stage by lot.

    Both nodes have a rank of the policy and one of its trainer, so that each comes to every stage.
    """
    reference = base / "nodes-undisturbed"
    tell(f"the undisturbed run for nodes: {_NUM_EPISODES} episodes")
    config = write_workload(reference, _NUM_EPISODES, is_wide=True, **_layout(num_nodes=1))
    expected = run_undisturbed(reference, config, uuid.uuid4().hex, 600.0)
    report = Report()
    for number, loss in enumerate(plan_losses(count, seed, has_spaces=can_cut())):
        found = _lose(base / f"nodes-{number}", loss, expected, limit_s + _REJOIN_S)
        report.add(found)
        (outcome,) = found.outcomes
        tell(
            f"node {number + 1} of {count}, {loss.stage}: {outcome.outcome} ({outcome.details}), "
            f"{outcome.recovery_s:.0f} s"
        )
    return report


def _lose(folder: Path, loss: NodeLoss, expected: Account, limit_s: float) -> Report:
    config = write_workload(folder, _NUM_EPISODES, is_wide=True, **_layout(num_nodes=2))
    nodes = TwoNodes(folder / "cluster", is_apart=loss.is_cut)
    moments = folder / "moments"
    (moments / "node.mark").write_text(nodes.second, encoding="utf-8")

    def strike() -> str:
        nodes.lose()
        (claimed,) = moments.glob("done.node.*")
        how = "cut off" if loss.is_cut else "killed"
        return f"{how} while it had {claimed.name.split('.')[3]} in this stage"

    try:
        campaign = Campaign(
            folder, config, uuid.uuid4().hex, nodes.environment, limit_s, {"node": strike}
        )
        report = campaign.survive([Fault("node", "node", loss.stage, loss.moment)], expected)
        silence = nodes.await_workers_end()
        report.left += silence.left
        if silence.waited_s > SOON_S:
            report.outcomes[0].tell(f"workers ended {silence.waited_s:.0f} s later")
        return report
    finally:
        nodes.close()


def _layout(num_nodes: int) -> dict[str, Any]:
    """Models that have two ranks have one on each node; so the others are on both, too."""
    return {"colocation": [list(FAULTS)], "devices_per_node": 2 // num_nodes}


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
