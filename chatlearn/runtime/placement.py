"""Placement as data: which worker of which model goes to which device of which node. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from chatlearn.errors import ConfigError, PlacementError
from chatlearn.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    from chatlearn.config import Config, ModelConfig

__all__ = [
    "DeviceInventory",
    "DeviceSlot",
    "ModelRequest",
    "PlacementPlan",
    "ReplicaSummary",
    "WorkerPlace",
    "build_requests",
    "check_local_sizes",
    "describe_placement",
    "plan_placement",
]


@dataclass(frozen=True)
class DeviceInventory:
    """The devices that there are.

    Attributes:
        num_nodes: machines.
        devices_per_node: devices of each; None: as many logical slots as are asked for.
        kind: `gpu`, or `logical` where slots stand for devices.
    """

    num_nodes: int
    devices_per_node: int | None
    kind: str


@dataclass(frozen=True)
class ModelRequest:
    """What one model asks for: replicas of one layout, on devices or on CPUs only."""

    model_name: str
    layout: ParallelLayout
    num_replicas: int
    is_cpu_only: bool
    cpus_per_rank: int

    @property
    def num_ranks(self) -> int:
        """Worker processes of the model."""
        return self.num_replicas * self.layout.world_size


@dataclass(frozen=True)
class DeviceSlot:
    """One device (a GPU, or a logical slot where there is none) of one node of the plan."""

    node: int
    device: int


@dataclass(frozen=True)
class WorkerPlace:
    """Where one worker goes.

    Attributes:
        model_name: its model.
        replica: its replica.
        rank: its rank within the replica.
        group: index of the placement group (one for each colocation group).
        slot: the device; None for a CPU-only worker.
        share: fraction of the device that this worker may reserve (1 / workers that share it).
        num_cpus: CPUs of a CPU-only worker.
    """

    model_name: str
    replica: int
    rank: int
    group: int
    slot: DeviceSlot | None
    share: float
    num_cpus: float


@dataclass(frozen=True)
class PlacementPlan:
    """The whole placement. `groups[i]` are the model names of placement group i."""

    places: tuple[WorkerPlace, ...]
    groups: tuple[tuple[str, ...], ...]
    num_nodes: int
    devices_per_node: int
    device_kind: str


def check_local_sizes(num_ranks: Mapping[str, int]) -> None:
    """Refuse what the `local` backend cannot run.

    Args:
        num_ranks: ranks by model, all replicas together.

    Raises:
        PlacementError: a model asks for more than one rank; names it.
    """
    for name, ranks in num_ranks.items():
        if ranks > 1:
            raise PlacementError(
                f"model {name!r} asks for {ranks} ranks; the local backend runs one rank per "
                "model: set its parallel sizes and num_gpu to 1, or runtime.backend: ray"
            )


def build_requests(
    config: Config, names: Sequence[str], trainable: Sequence[str]
) -> tuple[ModelRequest, ...]:
    """What each model asks for, by its section of the config.

    A trained model is one replica whose world includes its data-parallel copies; any other model
    has one replica for each TP x PP x CP devices.

    Raises:
        ConfigError: the counts do not add up.
    """
    return tuple(_build_request(config.model(name), name, name in trainable) for name in names)


def plan_placement(
    requests: Sequence[ModelRequest],
    colocation: Sequence[Sequence[str]],
    inventory: DeviceInventory,
) -> PlacementPlan:
    """Place every rank; groups take devices side by side, in order.

    Within a colocation group smaller models stand side by side on the group's devices, and
    models that meet on a device share it.

    Raises:
        PlacementError: there are fewer devices than are asked for.
    """
    groups = _group_names(requests, colocation)
    by_name = {request.model_name: request for request in requests}
    sizes = [
        max((r.num_ranks for n in group if not (r := by_name[n]).is_cpu_only), default=0)
        for group in groups
    ]
    per_node = inventory.devices_per_node
    if per_node is None:
        per_node = _count_slots_per_node(sizes, inventory.num_nodes)
    starts, stop = _line_up_groups(sizes, per_node)
    if stop > inventory.num_nodes * per_node:
        raise PlacementError(_shortage(groups, sizes, by_name, inventory, per_node))
    places: list[WorkerPlace] = []
    for index, (group, first, size) in enumerate(zip(groups, starts, sizes, strict=True)):
        places.extend(_place_group(index, [by_name[n] for n in group], first, size, per_node))
    return PlacementPlan(tuple(places), groups, inventory.num_nodes, per_node, inventory.kind)


@dataclass(frozen=True)
class ReplicaSummary:
    """Where one replica stands, in words."""

    group: int
    model_name: str
    replica: int
    num_ranks: int
    devices: str


def describe_placement(plan: PlacementPlan) -> list[ReplicaSummary]:
    """The replicas of a plan, by placement group."""
    found: list[ReplicaSummary] = []
    replicas: dict[tuple[int, str, int], list[WorkerPlace]] = {}
    for place in plan.places:
        replicas.setdefault((place.group, place.model_name, place.replica), []).append(place)
    for (group, name, replica), own in replicas.items():
        slots = [f"{p.slot.node}:{p.slot.device}" for p in own if p.slot is not None]
        shown = slots[0] if len(slots) == 1 else f"{slots[0]} .. {slots[-1]}" if slots else "CPU"
        share = own[0].share
        shared = f" (1/{round(1 / share)} each)" if slots and share < 1 else ""
        found.append(ReplicaSummary(group, name, replica, len(own), shown + shared))
    return found


def _build_request(model: ModelConfig, name: str, is_trainable: bool) -> ModelRequest:
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    cp = model.context_parallel_size
    is_cpu_only = model.num_cpu > 0
    if is_cpu_only:
        count = model.num_cpu // model.cpu_per_process
    else:
        count = model.num_gpu if model.num_gpu is not None else tp * pp * cp
    copies, rest = divmod(count, tp * pp * cp)
    if rest or copies < 1:
        raise ConfigError(
            f"models.{name}: {count} ranks are no multiple of TP x PP x CP = {tp} x {pp} x {cp}"
        )
    layout = ParallelLayout(
        tp_size=tp,
        pp_size=pp,
        dp_size=copies if is_trainable else 1,
        cp_size=cp,
        ep_size=model.expert_model_parallel_size,
        etp_size=model.expert_tensor_parallel_size,
        vpp_size=model.virtual_pipeline_model_parallel_size or 1,
    )
    _check_experts(name, layout)
    replicas = 1 if is_trainable else copies
    return ModelRequest(name, layout, replicas, is_cpu_only, model.cpu_per_process)


def _check_experts(name: str, layout: ParallelLayout) -> None:
    """Experts are spread over the ranks of one pipeline stage of one replica."""
    etp = layout.tp_size if layout.etp_size is None else layout.etp_size
    ranks = layout.tp_size * layout.cp_size * layout.dp_size
    has_experts = layout.ep_size > 1 or layout.etp_size is not None
    if has_experts and ranks % (layout.ep_size * etp):
        raise ConfigError(
            f"models.{name}: expert_model_parallel_size x expert_tensor_parallel_size = "
            f"{layout.ep_size} x {etp} = {layout.ep_size * etp} does not divide the "
            f"{ranks} ranks of a pipeline stage, TP x CP x DP = {layout.tp_size} x "
            f"{layout.cp_size} x {layout.dp_size} (DP is 1 for a model that is not trained; "
            "expert_tensor_parallel_size, where unset, is the TP size)"
        )


def _group_names(
    requests: Sequence[ModelRequest], colocation: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], ...]:
    names = [request.model_name for request in requests]
    joint = {name: tuple(n for n in group if n in names) for group in colocation for name in group}
    return tuple(dict.fromkeys(joint.get(name, (name,)) for name in names))


def _line_up_groups(sizes: Sequence[int], per_node: int) -> tuple[list[int], int]:
    """The first device of each group, and the number of devices up to the last group's end."""
    starts: list[int] = []
    first = 0
    for size in sizes:
        # A group that fits on a node does not straddle two.
        if size <= per_node < first % per_node + size:
            first = ceil(first / per_node) * per_node
        starts.append(first)
        first += size
    return starts, first


def _count_slots_per_node(sizes: Sequence[int], num_nodes: int) -> int:
    """The fewest logical slots of each node that hold every group."""
    per_node = max(1, ceil(sum(sizes) / num_nodes))
    while _line_up_groups(sizes, per_node)[1] > num_nodes * per_node:
        per_node += 1
    return per_node


def _place_group(
    index: int, requests: Sequence[ModelRequest], first: int, size: int, per_node: int
) -> list[WorkerPlace]:
    """Put the models of one group on devices `first` .. `first + size - 1`."""
    taken: list[tuple[ModelRequest, int]] = []
    users = [0] * size
    cursor = 0
    for request in sorted(requests, key=lambda r: -r.num_ranks):
        if request.is_cpu_only:
            continue
        if cursor + request.num_ranks > size:
            cursor = 0
        taken.append((request, cursor))
        for device in range(cursor, cursor + request.num_ranks):
            users[device] += 1
        cursor = (cursor + request.num_ranks) % size
    places: list[WorkerPlace] = []
    for request, start in taken:
        for number in range(request.num_ranks):
            device = first + start + number
            replica, rank = divmod(number, request.layout.world_size)
            slot = DeviceSlot(device // per_node, device % per_node)
            share = 1.0 / users[start + number]
            places.append(WorkerPlace(request.model_name, replica, rank, index, slot, share, 0.0))
    for request in requests:
        if request.is_cpu_only:
            cpus = float(request.cpus_per_rank)
            places.extend(
                WorkerPlace(request.model_name, replica, rank, index, None, 0.0, cpus)
                for replica in range(request.num_replicas)
                for rank in range(request.layout.world_size)
            )
    return places


def _shortage(
    groups: Sequence[Sequence[str]],
    sizes: Sequence[int],
    by_name: Mapping[str, ModelRequest],
    inventory: DeviceInventory,
    per_node: int,
) -> str:
    noun = "GPUs" if inventory.kind == "gpu" else "logical devices"
    there = inventory.num_nodes * per_node
    lines = [
        f"the models ask for {sum(sizes)} {noun}; there are {there} "
        f"({inventory.num_nodes} nodes x {per_node}):"
    ]
    for group, size in zip(groups, sizes, strict=True):
        asked = ", ".join(
            f"{n} {by_name[n].num_ranks}" for n in group if not by_name[n].is_cpu_only
        )
        if asked:
            lines.append(f"  {size:4d}  {asked}")
    if sum(sizes) <= there:
        lines.append(f"A group of up to {per_node} devices stays within a node, which leaves gaps.")
    lines.append("Lower num_gpu, or let models share devices with runtime.colocation.")
    return "\n".join(lines)
