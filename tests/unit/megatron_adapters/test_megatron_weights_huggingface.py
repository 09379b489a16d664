"""The renaming to transformers' names: what goes where, and what has no name there."""

import subprocess
import sys

import pytest

from chatlearn.errors import ConfigError
from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.weights.huggingface import huggingface_renaming

# Two groups, each with two query heads, a key head and a value head of four rows.
FIELDS = {
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 11,
    "max_sequence_length": 8,
}
EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 8}


def new_shapes(fields, **options):
    renaming = huggingface_renaming({**FIELDS, **fields}, **options)
    return {piece.new.key: piece.new.global_shape for piece in renaming.pieces}


def old_keys(fields, **options):
    return {piece.old.key for piece in huggingface_renaming({**FIELDS, **fields}, **options).pieces}


def test_the_second_tensor_parallel_rank_holds_the_second_group():
    shape = (3, 32, 16)
    held = TensorShard(
        "decoder.layers.self_attention.linear_qkv.weight",
        shape,
        Box((1, 16, 0), (1, 16, 16)),
        "float32",
        "0.decoder.layers.1.self_attention.linear_qkv.weight",
        (0, 0),
    )
    found = huggingface_renaming(FIELDS).apply([held])
    assert [(s.key, s.global_shape, s.box, s.local_offset) for s in found] == [
        ("model.layers.1.self_attn.q_proj.weight", (16, 16), Box((8, 0), (8, 16)), (0, 0)),
        ("model.layers.1.self_attn.k_proj.weight", (8, 16), Box((4, 0), (4, 16)), (8, 0)),
        ("model.layers.1.self_attn.v_proj.weight", (8, 16), Box((4, 0), (4, 16)), (12, 0)),
    ]
    assert {s.local_name for s in found} == {held.local_name}


def test_the_names_of_a_llama():
    assert {key: shape for key, shape in new_shapes({}).items() if "layers" not in key} == {
        "model.embed_tokens.weight": (11, 16),
        "model.norm.weight": (16,),
        "lm_head.weight": (11, 16),
    }
    prefix = "model.layers.2."
    shapes = {k.removeprefix(prefix): s for k, s in new_shapes({}).items() if k.startswith(prefix)}
    assert shapes == {
        "self_attn.q_proj.weight": (16, 16),
        "self_attn.k_proj.weight": (8, 16),
        "self_attn.v_proj.weight": (8, 16),
        "self_attn.o_proj.weight": (16, 16),
        "mlp.gate_proj.weight": (24, 16),
        "mlp.up_proj.weight": (24, 16),
        "mlp.down_proj.weight": (16, 24),
        "input_layernorm.weight": (16,),
        "post_attention_layernorm.weight": (16,),
    }


def test_tied_and_scalar_heads():
    tied = {"untie_embeddings_and_output_weights": False}
    assert "lm_head.weight" not in new_shapes(tied)
    shapes = new_shapes(tied, head="scalar")
    assert "lm_head.weight" not in shapes
    assert shapes["score.weight"] == (1, 16)


def test_transformer_engines_linear_layers_hold_the_norms_before_them():
    dense, experts = old_keys({}, use_te=True), old_keys(EXPERTS, use_te=True)
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in dense & experts
    assert "decoder.layers.mlp.linear_fc1.layer_norm_weight" in dense - experts
    assert "decoder.layers.pre_mlp_layernorm.weight" in experts - dense


def test_grouped_experts_have_the_same_names():
    grouped = {**EXPERTS, "moe_grouped_gemm": True}
    assert new_shapes(grouped) == new_shapes(EXPERTS)
    assert new_shapes(grouped)["model.layers.0.mlp.experts.gate_up_proj"] == (4, 16, 16)


@pytest.mark.parametrize(
    "fields",
    [
        {"attention_output_gate": True},
        {"position_embedding_type": "learned_absolute"},
        {"rotary_interleaved": True},
        {"normalization": "LayerNorm"},
        {"layernorm_zero_centered_gamma": True},
        {"swiglu": False},
        {"add_bias_linear": True, **EXPERTS},
        {"mtp_num_layers": 1},
    ],
)
def test_a_field_without_a_counterpart_is_named(fields):
    with pytest.raises(ConfigError, match=f"^{next(iter(fields))}: "):
        huggingface_renaming({**FIELDS, **fields})


def test_a_model_of_deepseeks_size_is_renamed_in_seconds():
    fields = {
        "num_layers": 61,
        "hidden_size": 7168,
        "num_attention_heads": 128,
        "kv_channels": 128,
        "vocab_size": 129280,
        "max_sequence_length": 4096,
        "num_moe_experts": 256,
        "moe_ffn_hidden_size": 2048,
    }
    renaming = huggingface_renaming(fields)
    assert len(renaming.pieces) == 3 + 61 * (3 * 128 + 6)


def test_the_renaming_loads_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_adapters.weights.huggingface\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
