"""Weights moved by the sync plan are those of a model built where they go, bit for bit."""

from functools import cache

import megatron_cases as cases
import pytest
import torch
from long_forms import every

from chatlearn.sync.plan import plan_sync
from chatlearn.sync.records import Endpoint

TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
PADDED = {"make_vocab_size_divisible_by": 16}
TIED = {"untie_embeddings_and_output_weights": False}
SIX_HEADS = {
    "num_attention_heads": 6,
    "num_query_groups": 6,
    "hidden_size": 48,
    "ffn_hidden_size": 96,
}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp4": (4, TP4),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, VPP2),
    "tp2-pp2": (4, {**TP2, **PP2}),
    "dp2": (2, {}),
    "padded-vocabulary": (2, {**TP2, **PADDED}),
    "uneven-pp2": (2, {**PP2, "num_layers_in_first_pipeline_stage": 1}),
    "tp2-distributed-optimizer": (4, {**TP2, "use_distributed_optimizer": True}),
    "tied": (1, TIED),
    "tied-pp2": (2, {**TIED, **PP2}),
    "tied-tp2-pp2": (4, {**TIED, **TP2, **PP2, **PADDED}),
    "six-tp2": (2, {**SIX_HEADS, **TP2}),
    "six-tp3": (3, {**SIX_HEADS, "tensor_model_parallel_size": 3}),
    "qkv-bias": (2, {**TP2, "add_qkv_bias": True, "num_query_groups": 2}),
    "qkv-bias-tp4": (4, {**TP4, "add_qkv_bias": True, "num_query_groups": 2}),
    "experts": (1, EXPERTS),
    "ep2": (2, {**EXPERTS, "expert_model_parallel_size": 2}),
    "ep4": (4, {**EXPERTS, "expert_model_parallel_size": 4}),
    "ep2-etp2": (
        4,
        {
            **EXPERTS,
            **TP2,
            "sequence_parallel": True,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
            "moe_token_dispatcher_type": "allgather",
        },
    ),
    "grouped-heads-tp4": (4, {**TP4, "num_query_groups": 2}),
    "grouped-heads": (1, {"num_query_groups": 2}),
}
PAIRS = [
    ("dp2", "tp2"),
    ("tp2", "pp2"),
    ("pp2", "tp4"),
    ("pp2-vpp2", "tp2-pp2"),
    ("tp2-pp2", "one"),
    ("tp4", "pp2-vpp2"),
    ("padded-vocabulary", "tp4"),
    ("one", "padded-vocabulary"),
    ("grouped-heads", "grouped-heads-tp4"),
    ("grouped-heads-tp4", "grouped-heads"),
    ("uneven-pp2", "tp2"),
    ("pp2-vpp2", "uneven-pp2"),
    ("tp2-distributed-optimizer", "pp2"),
    ("tied", "tied-tp2-pp2"),
    ("tied-pp2", "tied"),
    ("six-tp2", "six-tp3"),
    ("six-tp3", "six-tp2"),
    ("qkv-bias", "qkv-bias-tp4"),
    ("qkv-bias-tp4", "qkv-bias"),
    ("experts", "ep4"),
    ("ep2", "ep2-etp2"),
    ("ep2-etp2", "ep4"),
]


@pytest.fixture(scope="module")
def export(ranks):
    """Description and weights of each rank of a layout; each is built once."""

    @cache
    def built(name, seed):
        size, fields = LAYOUTS[name]
        return ranks.run(size, cases.export_weights, fields, seed)

    return built


def endpoints(model_name, exported, nodes):
    return [
        Endpoint(model_name, 0, rank, f"node{rank % nodes}", hash((model_name, rank)), shards)
        for rank, (shards, _) in enumerate(exported)
    ]


def carry_out(plan, tensors):
    """Move every bucket as the plan says; `tensors` by endpoint."""
    for hop in plan.hops:
        for piece in plan.buckets[hop.bucket].pieces:
            cell = piece.source if hop.source < plan.num_sources else piece.destination
            given = cell.shards[plan.groups[hop.source]]
            taken = piece.destination.shards[plan.groups[hop.destination]]
            values = tensors[hop.source][given.local_name][given.local_slices(piece.box)]
            region = tensors[hop.destination][taken.local_name][taken.local_slices(piece.box)]
            region.copy_(values.view(region.shape))


@pytest.mark.parametrize(("source", "destination"), every(2, PAIRS))
def test_synced_weights_are_bit_equal(export, source, destination):
    given, wanted = export(source, 1), export(destination, 1)
    for nodes in (1, 3):
        plan = plan_sync(endpoints("a", given, nodes), endpoints("b", wanted, nodes), 1 << 12)
        empty = [
            {name: torch.full_like(tensor, torch.nan) for name, tensor in tensors.items()}
            for _, tensors in wanted
        ]
        carry_out(plan, [*(tensors for _, tensors in given), *empty])
        for (shards, expected), found in zip(wanted, empty, strict=True):
            for shard in shards:
                part, name = shard.local_slices(), shard.local_name
                assert torch.equal(found[name][part], expected[name][part]), shard.key
