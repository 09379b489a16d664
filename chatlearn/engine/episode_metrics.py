"""From the finished calls of an episode to its metrics. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chatlearn.flow.execute import StageRecord

__all__ = ["WeightedMeans", "average_workers", "summarize_records", "wall_seconds"]


class WeightedMeans:
    """Means by name, of values that each stand for some rows."""

    def __init__(self) -> None:
        self._values: dict[str, list[tuple[float, float]]] = {}

    def add(self, metrics: Mapping[str, float], weight: float, prefix: str = "") -> None:
        """Count each metric with `weight` (rows that it stands for)."""
        for name, value in metrics.items():
            self._values.setdefault(prefix + name, []).append((float(value), weight))

    def result(self) -> dict[str, float]:
        """The means, by name; equal weights where no value of a name stands for a row."""
        return {name: _mean(values) for name, values in self._values.items()}


def summarize_records(records: Sequence[StageRecord], area: str) -> dict[str, float]:
    """Metrics of one flow's calls.

    Args:
        records: the calls.
        area: first part of the names, such as `rollout` or `train`.

    Returns:
        Row-weighted means of what modules logged as `area/model/name`, of what the flow's rows
        show in the end as `area/name`, and the busy seconds of each stage as
        `time/area/model.method` (the longest lane's).
    """
    means = WeightedMeans()
    busy: dict[str, dict[str, float]] = {}
    producers = _final_producers(records)
    for record in records:
        report = record.report
        weight = float(report.num_rows)
        means.add(report.metrics, weight, f"{area}/{record.model_name}/")
        shown = {k: v for k, v in report.row_statistics.items() if producers[k] == record.position}
        means.add(shown, weight, f"{area}/")
        lanes = busy.setdefault(f"time/{area}/{record.model_name}.{record.method_name}", {})
        lanes[record.lane] = lanes.get(record.lane, 0.0) + report.end_s - report.start_s
    seconds = {name: max(lanes.values()) for name, lanes in busy.items()}
    return {**means.result(), **seconds}


def average_workers(
    found: Mapping[str, Iterable[Mapping[str, float]]], area: str
) -> dict[str, float]:
    """Means over the workers that logged a name, as `area/model/name`.

    Args:
        found: for each model what its workers logged, one mapping each.
        area: first part of the names.
    """
    means = WeightedMeans()
    for model_name, workers in found.items():
        for metrics in workers:
            means.add(metrics, 1.0, f"{area}/{model_name}/")
    return means.result()


def _mean(values: Sequence[tuple[float, float]]) -> float:
    weights = sum(weight for _, weight in values)
    # Sorted, so that the rounding does not depend on which worker answers first.
    if not weights:
        return sum(sorted(value for value, _ in values)) / len(values)
    # A value without rows may be 0 / 0.
    return sum(sorted(value * weight for value, weight in values if weight)) / weights


def _final_producers(records: Iterable[StageRecord]) -> dict[str, tuple[bool, int]]:
    """For each row statistic the position of the last call that made its column."""
    found: dict[str, tuple[bool, int]] = {}
    for record in records:
        for name in record.report.row_statistics:
            found[name] = max(found.get(name, record.position), record.position)
    return found


def wall_seconds(records: Iterable[StageRecord]) -> float:
    """Seconds from the first call's start to the last call's end; 0 without calls."""
    spans = [(record.report.start_s, record.report.end_s) for record in records]
    if not spans:
        return 0.0
    return max(end for _, end in spans) - min(start for start, _ in spans)
