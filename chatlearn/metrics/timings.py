"""Which metrics tell of time, and so differ between two runs that are otherwise the same. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["is_timing", "without_timings"]

_NAMES = frozenset({"engine_overhead", "rollout/tokens_per_s"})


def is_timing(name: str) -> bool:
    """Whether a metric is a duration, or computed from one."""
    if name in _NAMES or name.startswith("time/"):
        return True
    return name.startswith("sync/") and name.rpartition("/")[2].startswith("seconds")


def without_timings(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a step that two deterministic runs of one config have in common."""
    return {name: value for name, value in metrics.items() if not is_timing(name)}
