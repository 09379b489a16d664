"""What the ranks of a world do where Megatron-Core's own re-sharder judges the weight sync."""

from __future__ import annotations

import megatron_cases as cases
import torch
from megatron.core import parallel_state
from megatron.core.resharding import swap_model_weights
from megatron.core.utils import unwrap_model

from scripts.bench.cpu_copy_service import CpuCopyService
from scripts.bench.sync_megatron import list_group_ranks, make_groups


def swap(rank, given, taken):
    """Re-shard a model of the fields `given` to one of `taken`, both over all ranks.

    Returns:
        Description and content of this rank's weights: the source's, and what the destination has
        after that.
    """
    world_size = torch.distributed.get_world_size()
    modules = []
    for seed, fields in enumerate((given, taken)):
        if modules:
            parallel_state.destroy_model_parallel()
        modules.append(cases.build_module(rank, "reference", fields, seed=1 + seed))
        own = unwrap_model(modules[-1].model[0])
        groups = list_group_ranks(cases.layout_of(fields, world_size), 1, 0)
        own.pg_collection = make_groups(groups, rank)
    before = modules[1].weight_tensors()
    before = {name: tensor.clone() for name, tensor in before.items()}
    swap_model_weights(*(unwrap_model(module.model[0]) for module in modules), CpuCopyService())
    exported = [(module.weight_shards(), module.weight_tensors()) for module in modules]
    changed = [name for name, old in before.items() if not torch.equal(old, exported[1][1][name])]
    return exported, changed
