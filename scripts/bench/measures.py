"""From rounds of two sides to a measure with its bar, and to the table and JSON of a benchmark."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import psutil
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from scripts.bench.rounds import Side

__all__ = [
    "Measure",
    "check_equal_parameters",
    "compute_rates",
    "find_best_peer",
    "print_measures",
    "say",
    "spread",
    "warn_of_company",
]

_PLAIN_WIDTH = 150
_BUSY_PERCENT = 15.0
_LEAST = 1e-9


@dataclass(frozen=True)
class Measure:
    """One figure of ours beside the peer's or a limit, and the bar that their ratio should reach.

    Attributes:
        name: of the measure.
        what: in words.
        ours: our figure, in `unit`.
        peer: the peer's, or where there is none the limit.
        unit: of both.
        bar: the ratio to reach.
        is_cap: less is better: the ratio is the peer's figure over ours.
        details: what they were computed from.
    """

    name: str
    what: str
    ours: float
    peer: float
    unit: str
    bar: float
    is_cap: bool = False
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ratio(self) -> float:
        """How good ours is in terms of the peer's."""
        above, below = (self.peer, self.ours) if self.is_cap else (self.ours, self.peer)
        return above / max(below, _LEAST)

    @property
    def is_met(self) -> bool:
        """Whether the bar is reached."""
        return self.ratio >= self.bar

    def as_json(self) -> dict[str, Any]:
        """For the last line of a benchmark."""
        return {
            "ours": _round(self.ours),
            "peer": _round(self.peer),
            "ratio": round(self.ratio, 4),
            "bar": self.bar,
            "is_met": self.is_met,
            "what": self.what,
            "unit": self.unit,
            **self.details,
        }


def spread(values: Sequence[float]) -> float:
    """Largest less smallest over the median: how quiet the machine was."""
    return (max(values) - min(values)) / statistics.median(values)


def compute_rates(reports: Iterable[Mapping[str, Any]], amount: str) -> list[float]:
    """Of each round: the amount over the seconds."""
    return [report["amounts"][amount] / report["seconds"] for report in reports]


def find_best_peer(rates: Mapping[str, Sequence[float]], ours: str) -> str:
    """The side with the highest median that is not ours."""
    peers = [name for name in rates if name != ours]
    return max(peers, key=lambda name: statistics.median(rates[name]))


def check_equal_parameters(sides: Sequence[Side]) -> int:
    """Parameters of the models; the same on every side, or the comparison means nothing.

    Raises:
        ValueError: they differ.
    """
    counts = {side.name: int(side.hello["num_parameters"]) for side in sides}
    if len(set(counts.values())) != 1:
        raise ValueError(f"the models differ, parameters: {counts}")
    return next(iter(counts.values()))


def print_measures(
    title: str, measures: Sequence[Measure], other: Sequence[Measure] = (), *, as_json: bool
) -> None:
    """A table; with `as_json` one JSON object as the last line.

    Args:
        title: of the table.
        measures: that count.
        other: that stand beside them: a further way to run ours.
        as_json: whether a program reads it.
    """
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH)
    table = Table(title=title)
    for name in ("measure", "what"):
        table.add_column(name)
    for name in ("ours", "peer", "ratio", "bar"):
        table.add_column(name, justify="right")
    table.add_column("met")
    table.add_column("from")
    for each in (*measures, *other):
        table.add_row(
            each.name,
            each.what,
            f"{each.ours:.4g} {each.unit}",
            f"{each.peer:.4g}",
            f"{each.ratio:.2f}",
            f"{each.bar:g}",
            "yes" if each.is_met else "no",
            ", ".join(f"{key} {_show(value)}" for key, value in each.details.items()),
        )
    console.print(table)
    if as_json:
        found: dict[str, Any] = {"measures": {m.name: m.as_json() for m in measures}}
        if other:
            found["other"] = {m.name: m.as_json() for m in other}
        print(json.dumps({**found, "machine": _describe_machine()}))


def say(text: str) -> None:
    """A line for the person who waits."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def warn_of_company() -> None:
    """Say so where the machine is not idle while nothing here runs."""
    busy_percent = psutil.cpu_percent(interval=1.0)
    if busy_percent > _BUSY_PERCENT:
        say(f"warning: something else takes {busy_percent:.0f} % of this machine: run it alone")


def _describe_machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "processor": _read_processor_name(),
    }


def _read_processor_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            found = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    except OSError:
        found = []
    return found[0] if found else platform.machine()


def _round(value: float) -> float:
    return float(f"{value:.6g}")


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
