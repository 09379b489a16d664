# pyright: standard, reportPrivateImportUsage=false
"""Makes Ray placement groups of a placement plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatlearn.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatlearn.runtime.placement import PlacementPlan, WorkerPlace

__all__ = ["ActorSlot", "create_groups", "match_nodes"]

# Planned node and device.
BundleKey = tuple[int, int]

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

    keys_of_groups: list[dict[WorkerPlace, BundleKey]] = []
    for index in range(len(plan.groups)):
        places = [place for place in plan.places if place.group == index]
        keys = _bundle_keys(places, has_gpus=plan.device_kind == "gpu")
        bundles = [_bundle(plan, keys, key) for key in dict.fromkeys(keys.values())]
        nodes = {place.slot.node for place in places if place.slot is not None}
        is_spread = len(nodes) > 1 and plan.device_kind != "gpu"
        strategy = "STRICT_SPREAD" if is_spread else "PACK"
        created.append(ray.util.placement_group(bundles, strategy=strategy))
        keys_of_groups.append(keys)
    for index, group in enumerate(created):
        ready, _ = ray.wait([group.ready()], timeout=timeout_s)
        if not ready:
            raise PlacementError(
                f"the cluster cannot place {', '.join(plan.groups[index])} within {timeout_s:g} s: "
                f"asked for {group.bundle_specs}, free is {ray.available_resources()}"
            )
    slots: dict[WorkerPlace, ActorSlot] = {}
    for group, keys in zip(created, keys_of_groups, strict=True):
        order = {key: at for at, key in enumerate(dict.fromkeys(keys.values()))}
        if plan.device_kind == "gpu":
            table: Any = ray.util.placement_group_table(group)
            order = match_nodes(order, table["bundles_to_node_id"])
        for place, key in keys.items():
            slots[place] = ActorSlot(group, order[key], *_take(plan, place))
    return slots


def match_nodes(
    order: Mapping[BundleKey, int], bundle_nodes: Mapping[int, str]
) -> dict[BundleKey, int]:
    """Which bundle stands for which planned device, once Ray has chosen the nodes.

    Ray packs bundles onto nodes as it likes; devices that the plan has on one node must be on one
    node in truth, so that a tensor-parallel group does not straddle two.

    Args:
        order: the bundle that was asked for each planned (node, device); -1 is the node of
            workers without a device.
        bundle_nodes: the node where Ray has put each bundle.

    Raises:
        PlacementError: Ray's nodes have no room for a planned node's devices.
    """
    free: dict[str, list[int]] = {}
    planned: dict[int, list[BundleKey]] = {}
    for key, bundle in order.items():
        if key[0] >= 0:
            planned.setdefault(key[0], []).append(key)
            free.setdefault(bundle_nodes[bundle], []).append(bundle)
    found = {key: bundle for key, bundle in order.items() if key[0] < 0}
    sizes = [len(bundles) for bundles in free.values()]
    for _, keys in sorted(planned.items(), key=lambda item: (-len(item[1]), item[0])):
        fitting = [node for node, bundles in free.items() if len(bundles) >= len(keys)]
        if not fitting:
            raise PlacementError(
                f"{len(keys)} devices of one node are planned together, but Ray has put the "
                f"group's devices on nodes as {sizes}: free whole nodes, "
                "or set runtime.devices_per_node to what is free on each"
            )
        chosen = free[min(fitting, key=lambda node: len(free[node]))]
        for key in sorted(keys):
            found[key] = chosen.pop(0)
    return found


def _bundle_keys(places: Sequence[WorkerPlace], *, has_gpus: bool) -> dict[WorkerPlace, BundleKey]:
    """Which bundle each worker goes to.

    With GPUs a bundle is one device, so that models that share it get the same one. Logical slots
    have no resource of their own that would keep them on their node: there a bundle is a node.
    """
    nodes = {place.slot.node for place in places if place.slot is not None}
    is_by_device = has_gpus or len(nodes) <= 1
    keys: dict[WorkerPlace, BundleKey] = {}
    for number, place in enumerate(places):
        if place.slot is not None:
            keys[place] = (place.slot.node, place.slot.device if is_by_device else 0)
        else:
            # A bundle of its own would ask for one node more where nodes are spread strictly.
            keys[place] = (-1, number) if is_by_device else (min(nodes), 0)
    return keys


def _bundle(
    plan: PlacementPlan, keys: Mapping[WorkerPlace, BundleKey], key: BundleKey
) -> dict[str, float]:
    own = [place for place, each in keys.items() if each == key]
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
