"""Counts of models whose sizes are public."""

import pytest

from chatlearn.cli.parameter_count import count_parameters, parameter_bytes

LLAMA_7B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "ffn_hidden_size": 11008,
    "vocab_size": 32000,
}
LLAMA_70B = {
    **LLAMA_7B,
    "num_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "ffn_hidden_size": 28672,
}
MIXTRAL_8X7B = {
    **LLAMA_7B,
    "num_query_groups": 8,
    "ffn_hidden_size": 14336,
    "num_moe_experts": 8,
}
QWEN2_7B = {
    "num_layers": 28,
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_query_groups": 4,
    "ffn_hidden_size": 18944,
    "vocab_size": 152064,
    "add_qkv_bias": True,
}
GPT2 = {
    "num_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "vocab_size": 50257,
    "max_sequence_length": 1024,
    "position_embedding_type": "learned_absolute",
    "swiglu": False,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
}


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        (LLAMA_7B, 6_738_415_616),
        (LLAMA_70B, 68_976_648_192),
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN2_7B, 7_615_616_512),
        (GPT2, 124_439_808),
    ],
)
def test_known_models_have_their_known_size(fields, count):
    assert count_parameters(fields, has_scalar_head=False) == count


def test_a_scalar_head_replaces_the_output_layer():
    lm = count_parameters(LLAMA_7B, has_scalar_head=False)
    scalar = count_parameters(LLAMA_7B, has_scalar_head=True)
    assert lm - scalar == 32000 * 4096 - 4096


def test_norms_of_queries_and_keys_count_once_a_layer():
    plain = count_parameters(LLAMA_7B, has_scalar_head=False)
    normed = count_parameters({**LLAMA_7B, "qk_layernorm": True}, has_scalar_head=False)
    assert normed - plain == 32 * 2 * 128


MIXED = {
    **LLAMA_7B,
    "num_layers": 4,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 1408,
    "moe_shared_expert_intermediate_size": 2816,
    "moe_shared_expert_gate": True,
}


@pytest.mark.parametrize(
    ("frequency", "num_sparse"), [(1, 4), (2, 2), (3, 2), ([0, 1, 1, 1], 3), ([0] * 4, 0)]
)
def test_dense_and_expert_layers_count_by_their_frequency(frequency, num_sparse):
    dense = 3 * 4096 * 11008
    sparse = 8 * 3 * 4096 * 1408 + 3 * 4096 * 2816 + 4096 * 8 + 4096
    plain = {**LLAMA_7B, "num_layers": 4}
    base = count_parameters(plain, has_scalar_head=False)
    count = count_parameters({**MIXED, "moe_layer_freq": frequency}, has_scalar_head=False)
    assert count - base == num_sparse * (sparse - dense)


@pytest.mark.parametrize(
    "fields",
    [{}, {**LLAMA_7B, "vocab_size": None}, {**LLAMA_7B, "multi_latent_attention": True}],
)
def test_what_is_not_known_is_not_guessed(fields):
    assert count_parameters(fields, has_scalar_head=False) is None


def test_half_precision_takes_two_bytes():
    assert [parameter_bytes({}), parameter_bytes({"bf16": True})] == [4, 2]
