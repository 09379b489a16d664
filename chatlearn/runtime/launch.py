"""Builds a Ray cluster out of one launcher process on every node, around one driver.

Node 0 starts Ray's head and the driver, a child process; every other node joins and stays until
the driver ends, then ends with its exit code. `scripts/run_ray_cluster.sh` runs this file as a
program; under torchrun `chatlearn.init()` turns each process that torchrun started into such a
launcher, and the driver is the same command once more, without torchrun's environment.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.errors import ChatLearnError, ConfigError, PlacementError
from chatlearn.parallel.sockets import find_own_addresses
from chatlearn.runtime.meeting import NodeLink, NodesListener, check_port
from chatlearn.runtime.ray_node import RayNode, start_child
from chatlearn.runtime.ray_token import agree_on_token

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from chatlearn.config import Config

__all__ = [
    "DriverWatch",
    "LaunchPlace",
    "join_torchrun_cluster",
    "launch",
    "read_script_place",
    "read_torchrun_place",
    "signals_kept",
]

_TICK_S = 0.2
_LEAVE_S = 30.0
_GRACE_S = 10.0
_DRIVER_END_S = 120.0
_DEFAULT_STARTUP_S = 300.0


@dataclass(frozen=True)
class LaunchPlace:
    """Which process of which node this is, and where the nodes meet.

    Attributes:
        node: this node's rank; 0 has the head and the driver.
        num_nodes: how many there are.
        process: number of this process within its node; only process 0 runs Ray.
        num_processes: launcher processes on all nodes.
        host: address of node 0.
        port: where the launchers meet on node 0; Ray's head takes the next one.
    """

    node: int
    num_nodes: int
    process: int
    num_processes: int
    host: str
    port: int

    @property
    def is_driver(self) -> bool:
        """Whether this process starts the head and the driver."""
        return self.node == 0 and self.process == 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"node {self.node}" + (f" process {self.process}" if self.process else "")


def read_script_place(environment: Mapping[str, str]) -> LaunchPlace:
    """The place that `NODE_RANK`, `NUM_NODES`, `MASTER_ADDR` and `MASTER_PORT` give.

    `RANK` and `WORLD_SIZE` stand in for the first two.

    Raises:
        ConfigError: one is missing or makes no sense.
    """
    node = _number(environment, "NODE_RANK", "RANK")
    num_nodes = _number(environment, "NUM_NODES", "WORLD_SIZE")
    port = _number(environment, "MASTER_PORT")
    host = environment.get("MASTER_ADDR", "")
    if not host:
        raise ConfigError("MASTER_ADDR is not set: give the address of node 0")
    if not 0 <= node < num_nodes:
        raise ConfigError(f"NODE_RANK={node} with NUM_NODES={num_nodes}: expected 0 to NUM_NODES-1")
    if not 0 < port < 65535:
        raise ConfigError(f"MASTER_PORT={port}: expected 1 to 65534 (Ray takes the next port)")
    return LaunchPlace(node, num_nodes, 0, num_nodes, host, port)


def read_torchrun_place(environment: Mapping[str, str]) -> LaunchPlace:
    """The place that torchrun's environment gives.

    torchrun itself uses `MASTER_PORT`; the launchers meet on the next port, or `CHATLEARN_PORT`.
    """
    port = environment.get("CHATLEARN_PORT") or str(int(environment["MASTER_PORT"]) + 1)
    return LaunchPlace(
        node=int(environment["GROUP_RANK"]),
        num_nodes=int(environment["GROUP_WORLD_SIZE"]),
        process=int(environment["LOCAL_RANK"]),
        num_processes=int(environment["WORLD_SIZE"]),
        host=environment["MASTER_ADDR"],
        port=int(port),
    )


def join_torchrun_cluster(config: Config) -> None:
    """Under torchrun: become a launcher and exit with the driver's exit code; else a no-op.

    Raises:
        ChatLearnError: the nodes did not come together.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    place = read_torchrun_place(os.environ)
    command = [sys.executable, *sys.orig_argv[1:]]
    sys.exit(launch(place, command, config.runtime.startup_timeout_s))


def launch(place: LaunchPlace, command: Sequence[str], timeout_s: float) -> int:
    """Run `command` on node 0 with a Ray cluster over all nodes.

    Args:
        place: where this process stands.
        command: the driver's command line; it finds the cluster by `RAY_ADDRESS`.
        timeout_s: limit of the nodes' coming together.

    Returns:
        The driver's exit code, on every node; 128 plus the signal's number where one stopped
        this process.

    Raises:
        ConfigError: the environment does not fit.
        PlacementError: a port is in use, or node 0 is out of reach.
    """
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']}: this launcher builds a cluster of its own; "
            "unset it, or use that cluster with scripts/run_local.sh"
        )
    is_alone = place.num_processes == 1
    with signals_kept() as signals:
        token = agree_on_token(is_driver=place.is_driver, is_alone=is_alone, timeout_s=timeout_s)
        if place.is_driver:
            return _drive(place, command, token, timeout_s, signals)
        return _Follower(place, token, timeout_s, signals).run()


class _StoppedError(Exception):
    """A signal came before the driver was there."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def _drive(
    place: LaunchPlace,
    command: Sequence[str],
    token: bytes,
    timeout_s: float,
    signals: queue.SimpleQueue[int],
) -> int:
    """Node 0: start the head, then the driver; tell the others how it ended."""
    own_host = _address_of(place.host)
    hosts = find_own_addresses(place.host) if place.num_processes > 1 else ("127.0.0.1",)
    listener = NodesListener(hosts, place.port, token, place.num_processes - 1)
    head: RayNode | None = None
    code = 1
    try:
        ray_port = place.port + 1
        check_port(ray_port)
        arguments = ["--head", f"--port={ray_port}", "--include-dashboard=false"]
        head = RayNode(arguments, own_host)
        head.wait_port(ray_port, timeout_s, lambda: _raise_signal(signals))
        address = f"{place.host}:{ray_port}"
        listener.start(address)
        extra = {"RAY_ADDRESS": address, "CHATLEARN_NUM_NODES": str(place.num_nodes)}
        code = DriverWatch(start_child(command, extra), head, listener, signals).wait()
    except _StoppedError as stop:
        code = 128 + stop.number
    finally:
        listener.end(code, _LEAVE_S)
        if head is not None:
            head.stop()
    return code


class DriverWatch:
    """Watches the driver, and the cluster under it.

    Args:
        process: the driver.
        head: Ray on this node.
        listener: where the other nodes are heard.
        signals: what this process received, to be forwarded.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        head: RayNode,
        listener: NodesListener,
        signals: queue.SimpleQueue[int],
    ) -> None:
        self._process = process
        self._head = head
        self._listener = listener
        self._signals = signals
        self._terminate_at: float | None = None
        self._kill_at: float | None = None
        self._is_ended_by_us = False

    def wait(self) -> int:
        """Until the driver has ended; gives its exit code."""
        while self._process.poll() is None:
            self._forward_signals()
            self._watch_cluster()
            self._keep_deadlines()
            time.sleep(_TICK_S)
        if self._is_ended_by_us:
            return 1
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    def _forward_signals(self) -> None:
        while not self._signals.empty():
            number = self._signals.get()
            self._process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)
            self._kill_at = self._kill_at or time.monotonic() + _DRIVER_END_S

    def _watch_cluster(self) -> None:
        while not self._listener.left.empty():
            left = self._listener.left.get()
            _say(f"{left.name}: {left.reason}")
            if left.was_in:
                self._end_soon()
        if self._terminate_at is None and not self._head.is_running():
            _say(self._head.failure())
            self._end_soon()

    def _end_soon(self) -> None:
        """The cluster is broken: the driver has a moment to say what that means for it."""
        self._terminate_at = self._terminate_at or time.monotonic() + _GRACE_S

    def _keep_deadlines(self) -> None:
        now = time.monotonic()
        if self._kill_at is None and self._terminate_at is not None and now > self._terminate_at:
            _say("the cluster lost a node: ending the driver")
            self._process.terminate()
            self._is_ended_by_us = True
            self._kill_at = now + _DRIVER_END_S
        if self._kill_at is not None and now > self._kill_at:
            _say(f"the driver did not end within {_DRIVER_END_S:g} s: killing it")
            self._process.kill()


class _Follower:
    """Any other node: joins, and leaves with the driver."""

    def __init__(
        self,
        place: LaunchPlace,
        token: bytes,
        timeout_s: float,
        signals: queue.SimpleQueue[int],
    ) -> None:
        self._place = place
        self._token = token
        self._timeout_s = timeout_s
        self._signals = signals
        self._events: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
        self._link: NodeLink | None = None
        self._ray: RayNode | None = None

    def run(self) -> int:
        """Until the driver has ended; gives its exit code."""
        threading.Thread(target=self._listen, daemon=True).start()
        reason = ""
        try:
            while True:
                if not self._signals.empty():
                    number = self._signals.get()
                    reason = f"stopped by {signal.Signals(number).name}"
                    return 128 + number
                if self._ray is not None and not self._ray.is_running():
                    reason = self._ray.failure()
                    raise PlacementError(reason)
                code = self._react()
                if code is not None:
                    return code
        finally:
            if self._ray is not None:
                self._ray.stop()
            if self._link is not None:
                self._link.leave(reason)

    def _react(self) -> int | None:
        """Act on what the driver says; gives the exit code once there is one."""
        try:
            kind, value = self._events.get(timeout=_TICK_S)
        except queue.Empty:
            return None
        if kind == "error":
            raise PlacementError(value)
        if kind == "end":
            return int(value)
        if self._place.process == 0:
            local_host = self._link.local_host if self._link is not None else "127.0.0.1"
            self._ray = RayNode([f"--address={value}"], local_host)
        return None

    def _listen(self) -> None:
        """In a thread of its own: turn messages into events."""
        place = self._place
        try:
            self._link = NodeLink(place.host, place.port, self._token, place.name, self._timeout_s)
            self._events.put(("start", self._link.wait_start(self._timeout_s)))
            self._events.put(("end", str(self._link.wait_end())))
        except PlacementError as error:
            self._events.put(("error", str(error)))


@contextmanager
def signals_kept() -> Generator[queue.SimpleQueue[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying of them."""
    received: queue.SimpleQueue[int] = queue.SimpleQueue()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    chosen = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    previous = {n: signal.signal(n, lambda number, _frame: received.put(number)) for n in chosen}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _raise_signal(signals: queue.SimpleQueue[int]) -> None:
    if not signals.empty():
        raise _StoppedError(signals.get())


def _address_of(host: str) -> str:
    import socket

    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR={host} is no known host: {error}") from error


def _number(environment: Mapping[str, str], *names: str) -> int:
    for name in names:
        value = environment.get(name)
        if value:
            if not value.isdecimal():
                raise ConfigError(f"{name}={value}: expected a whole number")
            return int(value)
    raise ConfigError(f"{' or '.join(names)} is not set")


def _say(text: str) -> None:
    sys.stderr.write(f"launcher: {text}\n")


def _main(command: Sequence[str]) -> int:
    try:
        if not command:
            raise ConfigError("no command: give the driver's command line")
        limit = float(os.environ.get("CHATLEARN_STARTUP_TIMEOUT_S") or _DEFAULT_STARTUP_S)
        return launch(read_script_place(os.environ), command, limit)
    except PlacementError as error:
        _say(f"error: {error}")
        return 1
    except ConfigError as error:
        _say(f"error: {error}")
        return 2
    except ChatLearnError as error:
        _say(f"error: {error}")
        return 1


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
