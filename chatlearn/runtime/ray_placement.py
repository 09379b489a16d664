"""Makes Ray placement groups of a placement plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatlearn.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.runtime.placement import PlacementPlan, WorkerPlace

__all__ = ["ActorSlot", "create_groups"]

# A logical slot stands for a device; it only marks a place, so that a laptop hosts many workers.
_LOGICAL_CPU = 0.001


@dataclass(frozen=True)
class ActorSlot:
    """Where Ray puts one actor, and what the actor takes there."""

    group: Any
    bundle: int
    num_cpus: float
    num_gpus: float


def create_groups(
    plan: PlacementPlan, created: list[Any], timeout_s: float
) -> dict[WorkerPlace, ActorSlot]:
    """One Ray placement group for each group of the plan; waits until all are ready.

    Args:
        plan: the placement.
        created: filled with the groups as they are made, so that the caller can remove them.
        timeout_s: limit of the wait, seconds.

    Raises:
        PlacementError: the cluster lacks the resources.
    """
    import ray

    slots: dict[WorkerPlace, ActorSlot] = {}
    for index in range(len(plan.groups)):
        places = [place for place in plan.places if place.group == index]
        nodes = sorted({place.slot.node for place in places if place.slot is not None})
        keys = _bundle_keys(places, is_single_node=len(nodes) <= 1)
        bundles = [_bundle(plan, places, keys, key) for key in dict.fromkeys(keys)]
        strategy = "STRICT_SPREAD" if len(nodes) > 1 else "PACK"
        group = ray.util.placement_group(bundles, strategy=strategy)
        created.append(group)
        order = {key: at for at, key in enumerate(dict.fromkeys(keys))}
        for place, key in zip(places, keys, strict=True):
            slots[place] = ActorSlot(group, order[key], *_take(plan, place))
    for index, group in enumerate(created):
        ready, _ = ray.wait([group.ready()], timeout=timeout_s)
        if not ready:
            raise PlacementError(
                f"the cluster cannot place {', '.join(plan.groups[index])} within {timeout_s:g} s: "
                f"asked for {group.bundle_specs}, free is {ray.available_resources()}"
            )
    return slots


def _bundle_keys(places: Sequence[WorkerPlace], *, is_single_node: bool) -> list[tuple[int, int]]:
    """Which bundle each worker goes to: one per device, or one per node on several nodes."""
    keys: list[tuple[int, int]] = []
    for number, place in enumerate(places):
        if place.slot is None:
            keys.append((-1, number))
        else:
            keys.append((place.slot.node, place.slot.device if is_single_node else 0))
    return keys


def _bundle(
    plan: PlacementPlan,
    places: Sequence[WorkerPlace],
    keys: Sequence[tuple[int, int]],
    key: tuple[int, int],
) -> dict[str, float]:
    own = [place for place, each in zip(places, keys, strict=True) if each == key]
    takes = [_take(plan, place) for place in own]
    bundle = {"CPU": max(_LOGICAL_CPU, round(sum(cpus for cpus, _ in takes), 4))}
    devices = {place.slot for place in own if place.slot is not None}
    if plan.device_kind == "gpu" and devices:
        bundle["GPU"] = float(len(devices))
    return bundle


def _take(plan: PlacementPlan, place: WorkerPlace) -> tuple[float, float]:
    """CPUs and GPUs that a worker's actor asks for."""
    if place.slot is None:
        return (place.num_cpus if plan.device_kind == "gpu" else _LOGICAL_CPU), 0.0
    return _LOGICAL_CPU, place.share if plan.device_kind == "gpu" else 0.0
