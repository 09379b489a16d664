"""The plan of a weight sync before any worker exists, from layouts, places and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.sync.plan import plan_sync
from chatlearn.sync.records import Endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.parallel.sharding import TensorShard
    from chatlearn.runtime.placement import PlacementPlan
    from chatlearn.sync.records import SyncPlan

__all__ = ["PlannedModel", "forecast_sync"]


@dataclass(frozen=True)
class PlannedModel:
    """One side of a sync as the config describes it.

    Attributes:
        name: of the model.
        descriptions: the shards of each rank of one replica.
        num_replicas: of the model.
    """

    name: str
    descriptions: Sequence[tuple[TensorShard, ...]]
    num_replicas: int


def forecast_sync(
    source: PlannedModel, destination: PlannedModel, placement: PlacementPlan, bucket_bytes: int
) -> SyncPlan:
    """Plan as the workers' own descriptions will have it, on the places that they will have.

    Raises:
        SyncError: the two models do not fit together.
    """
    places = {
        (place.model_name, place.replica, place.rank): place.slot for place in placement.places
    }
    is_gpu = placement.device_kind == "gpu"
    sides: list[list[Endpoint]] = []
    for side in (source, destination):
        sides.append([])
        for replica in range(side.num_replicas):
            for rank, shards in enumerate(side.descriptions):
                slot = places[side.name, replica, rank]
                device = f"{slot.node}:{slot.device}" if slot is not None and is_gpu else ""
                node = f"node {slot.node}" if slot is not None else "node 0"
                process = hash((side.name, replica, rank))
                sides[-1].append(Endpoint(side.name, replica, rank, node, process, shards, device))
    return plan_sync(sides[0], sides[1], bucket_bytes)
