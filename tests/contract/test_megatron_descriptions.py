"""What the config alone says of a rank's weights is what Megatron says of the live model."""

import megatron_cases as cases
import pytest
from long_forms import every

from chatlearn.config import load_config
from megatron_adapters.weights import describe_rank

TP2 = {"tensor_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
ETP1 = {"expert_tensor_parallel_size": 1}
SP2 = {**TP2, "sequence_parallel": True}
TIED = {"untie_embeddings_and_output_weights": False}
PADDED = {"make_vocab_size_divisible_by": 16}
BF16 = {"bf16": True}
BIASES = {"add_bias_linear": True, "normalization": "LayerNorm", "qk_layernorm": True}
LEARNED = {"position_embedding_type": "learned_absolute"}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 32}
SHARED = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}
BALANCED = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}
DENSE_FIRST = {**MOE, "moe_layer_freq": [0, 1, 1, 1]}
LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp4": (4, TP4),
    "pp2": (2, PP2),
    "pp4": (4, PP4),
    "pp2-vpp2": (2, VPP2),
    "pp2-uneven-first": (2, {**PP2, "num_layers_in_first_pipeline_stage": 1}),
    "pp2-uneven-both": (
        2,
        {
            **PP2,
            "num_layers_in_first_pipeline_stage": 3,
            "num_layers_in_last_pipeline_stage": 1,
        },
    ),
    "pp4-uneven-last": (4, {**PP4, "num_layers": 7, "num_layers_in_last_pipeline_stage": 1}),
    "pp2-vpp2-uneven-first": (
        2,
        {**VPP2, "num_layers": 6, "num_layers_in_first_pipeline_stage": 2},
    ),
    "pp2-embedding-counts": (
        2,
        {**PP2, "num_layers": 3, "account_for_embedding_in_pipeline_split": True},
    ),
    "pp2-vpp2-edges-count": (
        2,
        {
            **VPP2,
            "num_layers": 6,
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    "pp2-layout-text": (2, {**PP2, "pipeline_model_parallel_layout": "Et*3|t,L"}),
    "pp2-vpp2-layout-lists": (
        2,
        {
            **VPP2,
            "pipeline_model_parallel_layout": [
                ["embedding"],
                ["decoder", "decoder"],
                ["decoder"],
                ["decoder", "loss"],
            ],
        },
    ),
    "dp2": (2, {}),
    "tp2-pp2": (4, {**TP2, **PP2}),
    "tied": (1, TIED),
    "tied-pp2": (2, {**TIED, **PP2}),
    "tied-tp2-pp2-vpp2": (4, {**TIED, **TP2, **VPP2}),
    "padded-tp4": (4, {**TP4, **PADDED}),
    "padded-tied-tp2-pp2": (4, {**TP2, **PP2, **PADDED, **TIED}),
    "grouped-heads-tp4": (4, {**TP4, "num_query_groups": 2}),
    "wide-heads-tp2": (2, {**TP2, "kv_channels": 16}),
    "output-gate-tp2": (2, {**TP2, "attention_output_gate": True}),
    "qkv-bias-tp2": (2, {**TP2, "add_qkv_bias": True}),
    "qk-norm-tp2": (2, {**TP2, "qk_layernorm": True}),
    "biases-learned-positions-tp2-pp2": (4, {**TP2, **PP2, **BIASES, **LEARNED}),
    "gelu-biases-tp2": (2, {**TP2, **BIASES, "swiglu": False}),
    "sandwich-norms-tp2-pp2": (4, {**TP2, **PP2, **TIED, "sandwich_norms": True}),
    "own-layer-keys-pp2": (2, {**PP2, "hetereogenous_dist_checkpoint": True}),
    "bf16-tp2": (2, {**TP2, **BF16}),
    "ep2": (2, {**MOE, **EP2}),
    "ep2-pp2": (4, {**MOE, **EP2, **PP2}),
    "ep2-tp2-etp1": (2, {**MOE, **SP2, **EP2, **ETP1}),
    "ep2-tp2-etp1-dp2": (4, {**MOE, **SP2, **EP2, **ETP1}),
    "ep2-tp2-etp2": (4, {**MOE, **SP2, **EP2}),
    "ep4": (4, {**MOE, **EP4}),
    "ep4-tp2-etp1": (4, {**MOE, **SP2, **EP4, **ETP1}),
    "tp2-etp2": (2, {**MOE, **SP2}),
    "tp1-etp2": (2, {**MOE, "expert_tensor_parallel_size": 2}),
    "ep2-biases": (2, {**MOE, **EP2, **BIASES, **ETP1}),
    "shared-experts-tp2-ep2": (2, {**MOE, **SHARED, **SP2, **EP2, **ETP1}),
    "balanced-experts-bf16-ep2": (2, {**MOE, **BALANCED, **EP2, **BF16}),
    "dense-first-pp2-ep2": (4, {**DENSE_FIRST, **SHARED, **PP2, **EP2}),
    "every-other-layer-vpp2": (2, {**MOE, **VPP2, "moe_layer_freq": 2}),
}
OTHER_KINDS = {
    "generating-tp2": ("policy", 2, TP2),
    "scalar-tp2-pp2": ("value", 4, {**TP2, **PP2}),
    "scalar-tied-bf16-pp2": ("value", 2, {**PP2, **TIED, **BF16}),
    "trained-bf16-tp2-dp2": ("trainer", 4, {**TP2, **BF16, "use_distributed_optimizer": True}),
    "trained-ep2-dp2": ("trainer", 4, {**MOE, **BALANCED, **BF16, **EP2}),
}
LATENT = {
    **{key: cases.SHAPE[key] for key in ("num_layers", "hidden_size", "ffn_hidden_size")},
    "num_attention_heads": 4,
    "vocab_size": 40,
    "max_sequence_length": 24,
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
LATENT_LAYOUTS = {
    "one": (1, {}),
    "tp2": (2, TP2),
    "tp2-qk-norm": (2, {**TP2, "qk_layernorm": True}),
    "tp2-whole-query": (2, {**TP2, "q_lora_rank": None, "qk_layernorm": True}),
    "deepseek-tp2-pp2-ep2": (
        4,
        {
            **DENSE_FIRST,
            "moe_shared_expert_intermediate_size": 16,
            **BALANCED,
            "qk_layernorm": True,
            **TP2,
            **PP2,
            **EP2,
            **ETP1,
            "num_layers_in_first_pipeline_stage": 1,
        },
    ),
}


def by_name(shards):
    return {(shard.local_name, shard.local_offset): shard for shard in shards}


def assert_planned(ranks, kind, world_size, fields):
    config = load_config({"models": {"m": {**cases.SHAPE, **fields}}}).model("m")
    layout = cases.layout_of(fields, world_size)
    planned = cases.KINDS[kind]("m").planned_weight_shards(config, layout)
    live = ranks.run(world_size, cases.describe_live, kind, fields)
    assert len(planned) == len(live)
    for ours, theirs in zip(planned, live, strict=True):
        assert by_name(ours) == by_name(theirs)
        assert len(ours) == len(theirs)


@pytest.mark.parametrize("name", every(3, LAYOUTS))
def test_the_planned_shards_are_the_live_ones(ranks, name):
    assert_planned(ranks, "reference", *LAYOUTS[name])


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_the_planned_shards_fit_every_kind_of_module(ranks, name):
    assert_planned(ranks, *OTHER_KINDS[name])


@pytest.mark.parametrize("name", LATENT_LAYOUTS)
def test_latent_attention_is_described_as_megatron_does(ranks, name):
    world_size, changes = LATENT_LAYOUTS[name]
    fields = {**LATENT, **changes}
    live = ranks.run(world_size, cases.describe_live_latent, fields)
    layout = cases.layout_of(fields, world_size)
    for rank, theirs in enumerate(live):
        ours = describe_rank(fields, layout, rank)
        assert by_name(ours) == by_name(theirs)
        assert len(ours) == len(theirs)
