"""The measured process's end of a benchmark: it works when it is told to and sleeps in between.

It imports the standard library only, for peers in an environment of their own.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Gate", "SideArguments", "StepGate", "parse_side_arguments", "serve_work"]

_WAIT_S = 3600.0
STOP = "stop"


@dataclass(frozen=True)
class SideArguments:
    """What `rounds.py` gives on the command line: the socket's path, and options."""

    address: str
    options: dict[str, Any]


def parse_side_arguments() -> SideArguments:
    """Read the command line of a measured process."""
    return SideArguments(sys.argv[1], json.loads(sys.argv[2]))


class Gate:
    """A line of JSON to the driver, a line of JSON back. The wait takes no processor time.

    Args:
        address: of the driver's Unix socket.
    """

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(_WAIT_S)
        self._socket.connect(address)
        self._lines = self._socket.makefile("r", encoding="utf-8")

    def ask(self, report: dict[str, Any]) -> dict[str, Any]:
        """Report, and wait for the next order.

        Raises:
            SystemExit: the driver is gone.
        """
        try:
            self._socket.sendall(json.dumps(report).encode() + b"\n")
            line = self._lines.readline()
        except OSError:
            line = ""
        if not line:
            raise SystemExit("the benchmark is gone")
        return json.loads(line)

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self._socket.close()


class StepGate:
    """Lets a trainer's loop make as many steps as are ordered, and times them together.

    Called before each step: the time from one order to the call that finds no steps left is that
    of all that the loop does in a step.
    """

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._left = 0
        self._is_stopped = False
        self._start_s = self._start_epoch_s = 0.0
        self._amounts: dict[str, float] = {}
        self._hello: dict[str, Any] | None = {}

    def greet_with(self, **facts: Any) -> None:
        """What the first report says besides."""
        self._hello = facts

    def count(self, **amounts: float) -> None:
        """Add to what this round has produced."""
        for name, amount in amounts.items():
            self._amounts[name] = self._amounts.get(name, 0.0) + amount

    def before_step(self) -> bool:
        """Wait where no step is left; False once the benchmark is over."""
        if self._left == 0 and not self._is_stopped:
            order = self._gate.ask(self._report())
            self._is_stopped = STOP in order
            self._left = int(order.get("steps", 0))
            self._amounts = {}
            self._start_s, self._start_epoch_s = time.perf_counter(), time.time()
        self._left = max(0, self._left - 1)
        return not self._is_stopped

    def _report(self) -> dict[str, Any]:
        hello, self._hello = self._hello, None
        if hello is not None:
            return hello
        return {
            "seconds": time.perf_counter() - self._start_s,
            "start_s": self._start_epoch_s,
            "end_s": time.time(),
            "amounts": self._amounts,
        }


def serve_work(
    gate: Gate, work: Callable[[dict[str, Any]], dict[str, float]], hello: dict[str, Any]
) -> None:
    """Do and time the work of each order, until the driver says `stop`.

    An order may ask for `pieces` of work (1) after `warm` ones (0) that are not timed: while a side
    waits for its turn, its caches go cold and the machine may reclaim its idle memory.

    Args:
        gate: to the driver.
        work: gets the order; gives what was produced, by name.
        hello: the first report.
    """
    order = gate.ask(hello)
    while STOP not in order:
        for _ in range(order.get("warm", 0)):
            work(order)
        start_s = time.perf_counter()
        amounts: dict[str, float] = {}
        for _ in range(order.get("pieces", 1)):
            for name, amount in work(order).items():
                amounts[name] = amounts.get(name, 0.0) + amount
        order = gate.ask({"seconds": time.perf_counter() - start_s, "amounts": amounts})
    gate.close()
