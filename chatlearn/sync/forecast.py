"""The plan of a weight sync before any worker exists, from layouts, places and descriptions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.sync.plan import check_sides, plan_sync
from chatlearn.sync.records import Endpoint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.parallel.sharding import TensorShard
    from chatlearn.runtime.placement import PlacementPlan
    from chatlearn.sync.records import SyncPlan

__all__ = ["PlannedModel", "check_models", "forecast_sync"]


@dataclass(frozen=True)
class PlannedModel:
    """One side of a sync as the config describes it.

    Attributes:
        name: of the model.
        descriptions: the shards of each rank of one replica.
        num_replicas: of the model.
        left_out: its module's `left_out_weights`; they count for a destination.
    """

    name: str
    descriptions: Sequence[tuple[TensorShard, ...]]
    num_replicas: int
    left_out: Sequence[str] = ()


def check_models(source: PlannedModel, destination: PlannedModel) -> None:
    """Whether two models fit together, wherever they will be placed.

    Raises:
        SyncError: they do not; names tensors and ranks.
    """
    sides = [
        [
            Endpoint(side.name, 0, rank, "", 0, shards)
            for rank, shards in enumerate(side.descriptions)
        ]
        for side in (source, destination)
    ]
    check_sides(sides[0], sides[1], destination.left_out)


def forecast_sync(
    source: PlannedModel,
    destination: PlannedModel,
    placement: PlacementPlan,
    bucket_bytes: int,
    *,
    is_one_process: bool = False,
) -> SyncPlan:
    """Plan as the workers' own descriptions will have it, on the places that they will have.

    Args:
        source: the model that is trained.
        destination: its inference twin.
        placement: of all workers.
        bucket_bytes: most bytes of one bucket.
        is_one_process: all workers run in one process, as with the backend `local`.

    Raises:
        SyncError: the two models do not fit together.
    """
    places = {
        (place.model_name, place.replica, place.rank): place.slot for place in placement.places
    }
    is_gpu = placement.device_kind == "gpu"
    sides: list[list[Endpoint]] = []
    count = 0
    for side in (source, destination):
        sides.append([])
        for replica in range(side.num_replicas):
            for rank, shards in enumerate(side.descriptions):
                slot = places[side.name, replica, rank]
                device = f"{slot.node}:{slot.device}" if slot is not None and is_gpu else ""
                node = f"node {slot.node}" if slot is not None else "node 0"
                process = 0 if is_one_process else count
                sides[-1].append(Endpoint(side.name, replica, rank, node, process, shards, device))
                count += 1
    return plan_sync(sides[0], sides[1], bucket_bytes, left_out=destination.left_out)
