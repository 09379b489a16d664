"""How many threads a worker computes with: the cores of its node, shared with who works beside it.

The driver knows who shares a node; the worker knows how many cores its node has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatlearn.runtime.placement import PlacementPlan, WorkerPlace

__all__ = ["GroupDemand", "ThreadShare", "count_cores", "given_threads", "plan_thread_shares"]

_VARIABLE = "OMP_NUM_THREADS"
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


class GroupDemand(NamedTuple):
    """What one colocation group asks of a node; its models take turns.

    Attributes:
        num_ranks: most ranks that share the cores evenly.
        num_cpus: most cores that a CPU-only model asked for, all its ranks on the node together.
    """

    num_ranks: int = 0
    num_cpus: int = 0


@dataclass(frozen=True)
class ThreadShare:
    """A worker's part of its node's cores.

    Attributes:
        demands: of all groups on the node, the worker's own included.
        num_cpus: cores that a CPU-only model asked for; None: an even share of the rest.
        given: what the user set; it wins.
    """

    demands: tuple[GroupDemand, ...] = (GroupDemand(1),)
    num_cpus: int | None = None
    given: int | None = None

    def count_threads(self, cores: int) -> int:
        """Threads on a node of so many cores."""
        if self.given is not None:
            return self.given
        if self.num_cpus is not None:
            return max(1, min(self.num_cpus, cores))
        return max((share for share in range(1, cores + 1) if self._fits(share, cores)), default=1)

    def _fits(self, share: int, cores: int) -> bool:
        """Whether all groups can work at once where each even share is so large."""
        return sum(max(ranks * share, cpus) for ranks, cpus in self.demands) <= cores


def plan_thread_shares(
    plan: PlacementPlan, given: int | None = None
) -> dict[WorkerPlace, ThreadShare]:
    """Each worker's share. Models of one colocation group take turns, and so share one budget.

    Args:
        plan: the placement.
        given: threads that the user set for every worker.
    """
    nodes = {place: _node_of(plan, place) for place in plan.places}
    models: dict[int, dict[int, dict[str, GroupDemand]]] = {}
    for place, node in nodes.items():
        by_model = models.setdefault(node, {}).setdefault(place.group, {})
        ranks, cpus = by_model.get(place.model_name, GroupDemand())
        by_model[place.model_name] = (
            GroupDemand(ranks, cpus + int(place.num_cpus))
            if place.slot is None
            else GroupDemand(ranks + 1, cpus)
        )
    demands = {
        node: tuple(
            GroupDemand(*map(max, zip(*by_model.values(), strict=True)))
            for by_model in groups.values()
        )
        for node, groups in models.items()
    }
    return {
        place: ThreadShare(
            demands[node], int(place.num_cpus) if place.slot is None else None, given
        )
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
