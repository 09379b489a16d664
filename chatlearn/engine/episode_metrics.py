"""From the finished calls of an episode to its metrics. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chatlearn.flow.execute import StageRecord

__all__ = ["WeightedMeans", "summarize_records", "wall_seconds"]


class WeightedMeans:
    """Means by name, added up value by value."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, float], weight: float, prefix: str = "") -> None:
        """Count each metric with `weight` (rows that it stands for)."""
        for name, value in metrics.items():
            total, weights = self._sums.get(prefix + name, (0.0, 0.0))
            self._sums[prefix + name] = (total + float(value) * weight, weights + weight)

    def result(self) -> dict[str, float]:
        """The means, by name."""
        return {name: total / weight for name, (total, weight) in self._sums.items() if weight}


def summarize_records(records: Sequence[StageRecord], area: str) -> dict[str, float]:
    """Metrics of one flow's calls.

    Args:
        records: the calls.
        area: first part of the names, such as `rollout` or `train`.

    Returns:
        Row-weighted means of what modules logged as `area/model/name`, of what their rows show as
        `area/name`, and the busy seconds of each stage as `time/area/model.method` (the longest
        lane's).
    """
    means = WeightedMeans()
    busy: dict[str, dict[str, float]] = {}
    for record in records:
        report = record.report
        weight = float(max(report.num_rows, 1))
        means.add(report.metrics, weight, f"{area}/{record.model_name}/")
        means.add(report.row_statistics, weight, f"{area}/")
        lanes = busy.setdefault(f"time/{area}/{record.model_name}.{record.method_name}", {})
        lanes[record.lane] = lanes.get(record.lane, 0.0) + report.end_s - report.start_s
    seconds = {name: max(lanes.values()) for name, lanes in busy.items()}
    return {**means.result(), **seconds}


def wall_seconds(records: Iterable[StageRecord]) -> float:
    """Seconds from the first call's start to the last call's end; 0 without calls."""
    spans = [(record.report.start_s, record.report.end_s) for record in records]
    if not spans:
        return 0.0
    return max(end for _, end in spans) - min(start for start, _ in spans)
