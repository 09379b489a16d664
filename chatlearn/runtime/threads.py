"""How many threads a worker computes with: the cores of its node, shared with who works beside it.

The driver knows who shares a node; the worker knows how many cores its node has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatlearn.runtime.placement import PlacementPlan, WorkerPlace

__all__ = ["ThreadShare", "count_cores", "given_threads", "plan_thread_shares"]

_VARIABLE = "OMP_NUM_THREADS"
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class ThreadShare:
    """A worker's part of its node's cores.

    Attributes:
        num_busy: ranks that may work on the node at the same time, this one included.
        num_cpus: cores that a CPU-only model asked for; None: an even share.
        given: what the user set; it wins.
    """

    num_busy: int = 1
    num_cpus: int | None = None
    given: int | None = None

    def count_threads(self, cores: int) -> int:
        """Threads on a node of so many cores."""
        if self.given is not None:
            return self.given
        if self.num_cpus is not None:
            return max(1, min(self.num_cpus, cores))
        return max(1, cores // self.num_busy)


def plan_thread_shares(
    plan: PlacementPlan, given: int | None = None
) -> dict[WorkerPlace, ThreadShare]:
    """Each worker's share. Models of one colocation group take turns, and so share one budget.

    Args:
        plan: the placement.
        given: threads that the user set for every worker.
    """
    nodes = {place: _node_of(plan, place) for place in plan.places}
    ranks: dict[tuple[int, int], dict[str, int]] = {}
    for place, node in nodes.items():
        by_model = ranks.setdefault((node, place.group), {})
        by_model[place.model_name] = by_model.get(place.model_name, 0) + 1
    busy: dict[int, int] = {}
    for (node, _), by_model in ranks.items():
        busy[node] = busy.get(node, 0) + max(by_model.values())
    return {
        place: ThreadShare(busy[node], int(place.num_cpus) if place.slot is None else None, given)
        for place, node in nodes.items()
    }


def given_threads(*environments: Mapping[str, str]) -> int | None:
    """The user's OMP_NUM_THREADS, the first that is set; None where none is."""
    for environment in environments:
        # OpenMP takes a list, one number for each level of nesting.
        first = environment.get(_VARIABLE, "").partition(",")[0].strip()
        if first.isdecimal() and int(first) > 0:
            return int(first)
    return None


def count_cores(quota: Path = _CGROUP_QUOTA) -> int:
    """Cores that this process may use: its affinity, and the container's limit."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = max(1, cores or 1)
    try:
        limit, period = quota.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, int(limit) // int(period))) if limit.isdecimal() else cores


def _node_of(plan: PlacementPlan, place: WorkerPlace) -> int:
    """The node of a worker's device; without one, the first node of its group."""
    if place.slot is not None:
        return place.slot.node
    own = [p.slot.node for p in plan.places if p.group == place.group and p.slot is not None]
    return min(own, default=0)
