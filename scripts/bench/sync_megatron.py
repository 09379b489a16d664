# pyright: standard, reportPrivateImportUsage=false
"""Megatron-Core's own re-sharder, inside the Ray workers of the benchmark, over gloo."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scripts.bench.sync_baselines import joint_world

if TYPE_CHECKING:
    from chatlearn.parallel.context import WorkerContext
    from chatlearn.parallel.layout import ParallelLayout

__all__ = ["GroupRanks", "list_group_ranks", "make_groups", "prepare_megatron", "swap_weights"]

_SWAP = "benchmark megatron"


@dataclass(frozen=True)
class GroupRanks:
    """The groups of one model, in ranks of the joint world: axis -> groups."""

    tp: tuple[tuple[int, ...], ...]
    pp: tuple[tuple[int, ...], ...]
    dp: tuple[tuple[int, ...], ...]


def list_group_ranks(layout: ParallelLayout, num_replicas: int, first: int) -> GroupRanks:
    """The groups of a model whose ranks begin at `first`; replicas count as data-parallel."""
    found: dict[str, dict[tuple[Any, ...], list[int]]] = {"tp": {}, "pp": {}, "dp": {}}
    for replica in range(num_replicas):
        for rank in range(layout.world_size):
            at = layout.coordinates(rank)
            place = {"tp": at.tp_rank, "pp": at.pp_rank, "dp": (replica, at.dp_rank)}
            for axis, groups in found.items():
                rest = tuple(value for name, value in place.items() if name != axis)
                groups.setdefault(rest, []).append(first + replica * layout.world_size + rank)
    return GroupRanks(**{axis: tuple(map(tuple, g.values())) for axis, g in found.items()})


@dataclass(frozen=True)
class _Groups:
    """What the re-sharder reads of a model's groups."""

    tp: Any
    pp: Any
    dp: Any


class _Swap:
    """Both models as this rank sees them, and the service; a resource of its context."""

    def __init__(self, context: WorkerContext, source: GroupRanks, destination: GroupRanks) -> None:
        from megatron.core.utils import unwrap_model

        from scripts.bench.cpu_copy_service import CpuCopyService

        world = joint_world(context)
        given = make_groups(source, world.rank)
        taken = make_groups(destination, world.rank)
        own: Any = unwrap_model(context.module.model[0])
        is_source = world.rank < world.num_sources
        own.pg_collection = given if is_source else taken
        absent: Any = _absent_model(own.config, taken if is_source else given)
        self.source: Any = own if is_source else absent
        self.destination: Any = absent if is_source else own
        self.service = CpuCopyService()

    def close(self) -> None:
        """The models are the module's."""


def prepare_megatron(context: WorkerContext, source: GroupRanks, destination: GroupRanks) -> None:
    """Make the groups that the re-sharder needs; its plan is made by the first swap."""
    logging.getLogger("megatron.core.resharding").setLevel(logging.WARNING)
    context.keep(_SWAP, lambda: _Swap(context, source, destination))


def swap_weights(context: WorkerContext) -> int:
    """One `swap_model_weights`; gives the bytes that came to this rank from others."""
    from megatron.core.resharding import swap_model_weights

    swap = context.keep(_SWAP, _missing_swap)
    swap.service.num_bytes = 0
    swap_model_weights(swap.source, swap.destination, swap.service)
    return swap.service.num_bytes


def make_groups(ranks: GroupRanks, rank: int) -> _Groups:
    """Every rank takes part in making every group; it keeps those that it is in."""
    import torch.distributed as dist

    def make(groups: Sequence[tuple[int, ...]]) -> Any:
        made = [(group, dist.new_group(list(group))) for group in groups]
        return next((handle for group, handle in made if rank in group), None)

    return _Groups(make(ranks.tp), make(ranks.pp), make(ranks.dp))


def _absent_model(config: Any, groups: _Groups) -> Any:
    """A model without parameters: what a rank shows of the model that it has no part of."""
    import torch

    model: Any = torch.nn.Module()
    model.config = config
    # A group that is None would be looked up in Megatron's global state.
    model.pg_collection = _Groups(groups.tp or (), groups.pp or (), groups.dp or ())
    return model


def _missing_swap() -> _Swap:
    raise RuntimeError("prepare_megatron has not run in this worker")
