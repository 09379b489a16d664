"""Placement as data: which worker of which model goes to which device of which node. Pure."""

from dataclasses import dataclass

__all__ = ["DeviceSlot", "PlacementPlan", "WorkerPlace"]


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
        share: fraction of the device that this worker may reserve (1 / models that share it).
        num_cpus: CPUs to reserve.
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
    device_kind: str  # "gpu" or "logical"
