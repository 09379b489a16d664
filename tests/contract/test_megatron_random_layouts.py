"""Random models on random layouts: the first step is that of one rank."""

import random

import megatron_cases as cases
import pytest

MODELS = {
    "llama": {},
    "grouped": {"num_query_groups": 2, "add_qkv_bias": True},
    "tied": {"untie_embeddings_and_output_weights": False, "qk_layernorm": True},
    "gemma": {
        "sandwich_norms": True,
        "layernorm_zero_centered_gamma": True,
        "swiglu": False,
        "gated_linear_unit": True,
        "activation": "gelu_tanh",
        "window_size": [3, 0],
        "window_attn_skip_freq": [1, 0, 1, 0],
        "rotary_base_local": 100.0,
        "embedding_scale": 2.0,
    },
    "latent": {
        "multi_latent_attention": True,
        "num_query_groups": None,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_head_dim": 8,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
        "qk_layernorm": True,
        "rope_type": "rope",
    },
    "experts": {
        "num_moe_experts": 4,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 16,
        "moe_router_load_balancing_type": "none",
    },
}


def draw_case(seed):
    """A model, a layout of up to four ranks with options, and the micro-batches' size."""
    draw = random.Random(seed)
    name = draw.choice(list(MODELS))
    sizes = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2)]
    tp, pp, cp = draw.choice(sizes)
    world_size = tp * pp * cp * (draw.choice([1, 2]) if tp * pp * cp <= 2 else 1)
    fields = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "use_distributed_optimizer": draw.random() < 0.5,
        "make_vocab_size_divisible_by": draw.choice([1, 8]),
    }
    if tp > 1 and (name == "experts" or draw.random() < 0.5):
        fields["sequence_parallel"] = True
    if name == "experts" and tp > 1:
        fields["expert_tensor_parallel_size"] = tp
    if pp > 1 and draw.random() < 0.4:
        fields["virtual_pipeline_model_parallel_size"] = 2
    elif pp > 1 and draw.random() < 0.5:
        fields["num_layers_in_first_pipeline_stage"] = draw.choice([1, 3])
    if draw.random() < 0.4:
        fields |= {
            "recompute_granularity": "full",
            "recompute_method": draw.choice(["uniform", "block"]),
            "recompute_num_layers": 1,
        }
    return name, world_size, fields, draw.choice([1, 2, 3, 7])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(40))
def test_a_random_layout_trains_as_one_rank(ranks, seed):
    name, world_size, fields, micro_batch_size = draw_case(seed)
    model = MODELS[name]
    (expected,) = ranks.run(1, cases.train_supervised, model, 1)[0]
    found = ranks.run(world_size, cases.train_supervised, {**model, **fields}, 1, micro_batch_size)
    for (step,) in found:
        assert step == pytest.approx(expected, rel=2e-5), (name, world_size, fields)
