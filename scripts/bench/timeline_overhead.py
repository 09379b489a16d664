"""What the engine adds to a step: wall time in which no worker was busy, from a run's timeline."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["Span", "compute_overhead", "covered_seconds", "read_metric", "read_spans"]


@dataclass(frozen=True)
class Span:
    """A stretch of time, seconds since the epoch."""

    start_s: float
    end_s: float


def read_spans(timeline: Path) -> list[Span]:
    """Every call and sync of a run's `timeline.json`."""
    events: list[dict[str, Any]] = json.loads(timeline.read_text("utf-8"))["traceEvents"]
    return [
        Span(event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6)
        for event in events
        if event["ph"] == "X"
    ]


def covered_seconds(spans: Iterable[Span], window: Span) -> float:
    """Seconds of the window in which at least one span runs."""
    total, reached = 0.0, window.start_s
    for span in sorted(spans, key=lambda span: span.start_s):
        start, end = max(span.start_s, reached), min(span.end_s, window.end_s)
        if end > start:
            total, reached = total + end - start, end
    return total


def compute_overhead(spans: Sequence[Span], windows: Iterable[Span]) -> list[float]:
    """Of each window the share in which nobody was busy."""
    return [
        1.0 - covered_seconds(spans, window) / (window.end_s - window.start_s) for window in windows
    ]


def read_metric(metrics: Path, name: str) -> list[float]:
    """A number of each episode of a run's `metrics.jsonl`; none where it has no such metric."""
    lines = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    return [float(line[name]) for line in lines if name in line]
