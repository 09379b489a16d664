"""Where the launchers of several nodes meet: the driver's node listens, every other node calls.

A caller proves with a keyed hash that it holds the shared token, and so does the listener; the
token itself never travels. After that the listener sends one JSON object a line: `start` with
Ray's address, `alive` as a sign of life, and `end` with the driver's exit code.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import queue
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import PlacementError
from chatlearn.parallel.sockets import listen_at

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NodeLeft", "NodeLink", "NodesListener", "check_port", "listen"]

_ALIVE_EVERY_S = 5.0
_SILENCE_S = 60.0
_HANDSHAKE_S = 10.0
_RETRY_S = 0.3
_LINE_LIMIT_BYTES = 4096


@dataclass(frozen=True)
class NodeLeft:
    """A caller that went away, or that was turned away (`was_in` is False), and why."""

    name: str
    reason: str
    was_in: bool


class _Line:
    """A socket that sends and receives JSON lines, every wait bounded."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self.connection = connection
        self.connection.settimeout(timeout_s)
        self._rest = b""

    def send(self, message: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any]:
        """The next message; an empty dict where the other side has closed.

        Raises:
            OSError: the connection broke, or nothing came in time.
            ValueError: what came is no message.
        """
        while b"\n" not in self._rest:
            if len(self._rest) > _LINE_LIMIT_BYTES:
                raise ValueError("a message without an end")
            found = self.connection.recv(_LINE_LIMIT_BYTES)
            if not found:
                return {}
            self._rest += found
        line, _, self._rest = self._rest.partition(b"\n")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("a message that is no object")
        return cast("dict[str, Any]", message)


class NodesListener:
    """The driver's side.

    Args:
        hosts: addresses of this machine to listen at.
        port: TCP port to listen on.
        token: the shared secret.
        num_callers: processes that will call.

    Raises:
        PlacementError: the port is in use.
    """

    def __init__(self, hosts: Sequence[str], port: int, token: bytes, num_callers: int) -> None:
        self._token = token
        self._num_callers = num_callers
        self._lines: dict[str, _Line] = {}
        self._lock = threading.Lock()
        self._start_message: dict[str, Any] | None = None
        self._is_ending = False
        self.left: queue.Queue[NodeLeft] = queue.Queue()
        self._servers = [listen(host, port) for host in hosts]
        for server in self._servers:
            threading.Thread(target=self._accept, args=(server,), daemon=True).start()
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def start(self, address: str) -> None:
        """Tell every caller, also those still to come, where Ray's head is."""
        with self._lock:
            self._start_message = {"kind": "start", "address": address}
            lines = list(self._lines.items())
        for name, line in lines:
            self._tell(name, line, self._start_message)

    def end(self, exit_code: int, timeout_s: float) -> None:
        """Tell every caller how the run ended, and wait until they have left."""
        with self._lock:
            self._is_ending = True
            lines = list(self._lines.items())
        for name, line in lines:
            self._tell(name, line, {"kind": "end", "exit_code": exit_code})
        deadline = time.monotonic() + timeout_s
        while self.num_present and time.monotonic() < deadline:
            time.sleep(0.05)
        for server in self._servers:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)
            server.close()

    @property
    def num_present(self) -> int:
        """Callers that are connected now."""
        with self._lock:
            return len(self._lines)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            # A thread each: a stranger who says nothing holds nobody up.
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        name = str(connection.getpeername()[0])
        line = _Line(connection, _HANDSHAKE_S)
        try:
            name = self._admit(line)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.left.put(NodeLeft(name, f"turned away: {error}", was_in=False))
            connection.close()
            return
        reason = "its connection closed"
        connection.settimeout(None)
        try:
            while message := line.receive():
                reason = str(message.get("reason", reason))
        except (OSError, ValueError) as error:
            reason = str(error)
        with self._lock:
            self._lines.pop(name, None)
            is_ending = self._is_ending
        connection.close()
        if not is_ending:
            self.left.put(NodeLeft(name, f"left early: {reason}", was_in=True))

    def _admit(self, line: _Line) -> str:
        """Check a caller's proof and take it in; gives its name."""
        challenge = secrets.token_hex(32)
        line.send({"challenge": challenge})
        hello = line.receive()
        if not hello:
            raise ValueError("it hung up")
        name = str(hello["name"])
        if not hmac.compare_digest(
            str(hello["proof"]), _prove(self._token, challenge, f"caller {name}")
        ):
            reason = (
                "its token differs from the driver's: give every node the same RAY_AUTH_TOKEN or "
                "RAY_AUTH_TOKEN_PATH"
            )
            line.send({"kind": "refused", "reason": reason})
            raise ValueError(reason)
        with self._lock:
            if name in self._lines or len(self._lines) >= self._num_callers:
                reason = f"there is a {name} already, or one too many: check NODE_RANK, NUM_NODES"
                line.send({"kind": "refused", "reason": reason})
                raise ValueError(reason)
            proof = _prove(self._token, str(hello["challenge"]), "driver")
            line.send({"kind": "welcome", "proof": proof})
            self._lines[name] = line
            if self._start_message is not None:
                line.send(self._start_message)
        return name

    def _keep_alive(self) -> None:
        while not self._is_ending:
            with self._lock:
                lines = list(self._lines.items())
            for name, line in lines:
                self._tell(name, line, {"kind": "alive"})
            time.sleep(_ALIVE_EVERY_S)

    def _tell(self, name: str, line: _Line, message: dict[str, Any]) -> None:
        with self._lock:
            if name in self._lines:
                # A caller that is gone is noticed by the thread that reads from it.
                with contextlib.suppress(OSError):
                    line.send(message)


class NodeLink:
    """A caller's side.

    Args:
        host: the driver's node.
        port: its listener's port.
        token: the shared secret.
        name: unique name of this caller, such as `node 1`.
        timeout_s: limit of the wait for the listener.

    Raises:
        PlacementError: the listener cannot be reached, or refuses.
    """

    def __init__(self, host: str, port: int, token: bytes, name: str, timeout_s: float) -> None:
        connection = _call(host, port, name, timeout_s)
        self.local_host = str(connection.getsockname()[0])
        self._line = _Line(connection, _HANDSHAKE_S)
        self._where = f"{host}:{port}"
        try:
            self._enter(token, name)
        except (OSError, ValueError, KeyError) as error:
            raise PlacementError(
                f"{name}: what answers at {self._where} is not the driver's launcher "
                f"({error}): is the port in use by another program? Check MASTER_PORT"
            ) from error
        connection.settimeout(_SILENCE_S)

    def wait_start(self, timeout_s: float) -> str:
        """Wait for Ray's address.

        Raises:
            PlacementError: it did not come in time, or the driver ended.
        """
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            message = self._next()
            if message["kind"] == "start":
                return str(message["address"])
            if message["kind"] == "end":
                raise PlacementError("the driver ended before it started Ray")
        raise PlacementError(f"the driver at {self._where} did not start Ray in {timeout_s:g} s")

    def wait_end(self) -> int:
        """Wait for the driver's exit code; signs of life bound the wait.

        Raises:
            PlacementError: the driver is gone without having said how it ended.
        """
        while True:
            message = self._next()
            if message["kind"] == "end":
                return int(message["exit_code"])

    def leave(self, reason: str = "") -> None:
        """Hang up, with a reason if it is early."""
        with contextlib.suppress(OSError):
            if reason:
                self._line.send({"reason": reason})
            self._line.connection.shutdown(socket.SHUT_RDWR)
        self._line.connection.close()

    def _enter(self, token: bytes, name: str) -> None:
        own = secrets.token_hex(32)
        challenge = str(self._line.receive()["challenge"])
        proof = _prove(token, challenge, f"caller {name}")
        self._line.send({"name": name, "proof": proof, "challenge": own})
        answer = self._line.receive()
        if answer.get("kind") == "refused":
            raise PlacementError(f"{name} is refused by {self._where}: {answer['reason']}")
        if not hmac.compare_digest(str(answer["proof"]), _prove(token, own, "driver")):
            raise ValueError("its proof of the token is wrong")

    def _next(self) -> dict[str, Any]:
        try:
            message = self._line.receive()
        except TimeoutError:
            raise PlacementError(
                f"the driver at {self._where} gave no sign of life for {_SILENCE_S:g} s"
            ) from None
        except (OSError, ValueError) as error:
            raise PlacementError(f"lost the driver at {self._where}: {error}") from error
        if not message:
            raise PlacementError(f"lost the driver at {self._where}: it hung up")
        return message


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address of this machine.

    Raises:
        PlacementError: the port is in use.
    """
    try:
        return listen_at(host, port)
    except OSError as error:
        raise _describe_busy(port, error) from error


def check_port(port: int) -> None:
    """See that a port is free on every interface.

    Raises:
        PlacementError: it is in use.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise _describe_busy(port, error) from error


def _describe_busy(port: int, error: OSError) -> PlacementError:
    return PlacementError(
        f"port {port} of this machine is in use or not allowed ({error.strerror}): choose "
        "another MASTER_PORT (CHATLEARN_PORT under torchrun), the same on every node"
    )


def _call(host: str, port: int, name: str, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((host, port), timeout=_HANDSHAKE_S)
        except OSError as error:
            if time.monotonic() > deadline:
                raise PlacementError(
                    f"{name} cannot reach the driver's launcher at {host}:{port} within "
                    f"{timeout_s:g} s ({error}): is rank 0 up, and are MASTER_ADDR and "
                    "MASTER_PORT the same on every node?"
                ) from error
        time.sleep(_RETRY_S)


def _prove(token: bytes, challenge: str, role: str) -> str:
    return hmac.new(token, f"{role} {challenge}".encode(), "sha256").hexdigest()
