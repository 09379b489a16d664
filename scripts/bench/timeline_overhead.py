"""From a run's timeline: time of a step in which no worker was busy, and how long each was."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = [
    "Span",
    "compute_overhead",
    "covered_seconds",
    "read_spans",
    "sum_by_model",
]


@dataclass(frozen=True)
class Span:
    """A stretch of time, seconds since the epoch; `label`: the model that was busy, or `sync`."""

    start_s: float
    end_s: float
    label: str = ""


def read_spans(timeline: Path) -> list[Span]:
    """Every call and sync of a run's `timeline.json`."""
    events: list[dict[str, Any]] = json.loads(timeline.read_text("utf-8"))["traceEvents"]
    models = {e["tid"]: e["args"]["name"].partition("[")[0] for e in events if e["ph"] == "M"}
    return [
        Span(
            event["ts"] / 1e6,
            (event["ts"] + event["dur"]) / 1e6,
            "sync" if event["name"] == "sync" else models[event["tid"]],
        )
        for event in events
        if event["ph"] == "X"
    ]


def sum_by_model(spans: Sequence[Span], windows: Iterable[Span]) -> dict[str, float]:
    """Seconds of each label that begin within a window; the median of the windows."""
    found: list[dict[str, float]] = []
    for window in windows:
        sums: dict[str, float] = defaultdict(float)
        for span in spans:
            if window.start_s <= span.start_s < window.end_s:
                sums[span.label] += span.end_s - span.start_s
        found.append(sums)
    labels = sorted({label for sums in found for label in sums})
    return {label: statistics.median(sums.get(label, 0.0) for sums in found) for label in labels}


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
