"""What a rank of a Megatron model holds, told from the config alone."""

import subprocess
import sys

import pytest

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.weights import describe_layout, describe_rank

FIELDS = {
    "num_layers": 2,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 10,
    "max_sequence_length": 16,
}
MOE = {**FIELDS, "num_moe_experts": 4, "moe_ffn_hidden_size": 6}
QKV = "self_attention.linear_qkv.weight"
EMBEDDING = "embedding.word_embeddings.weight"


def holdings(shards, ending):
    """Offsets and shapes of the shards whose key ends so."""
    return [(s.box.offset, s.box.shape) for s in shards if s.key.endswith(ending)]


def test_a_layer_is_an_axis_of_the_global_tensor():
    shards = describe_rank(FIELDS, ParallelLayout(tp_size=2), 1)
    assert holdings(shards, QKV) == [((0, 8, 0), (1, 8, 8)), ((1, 8, 0), (1, 8, 8))]
    assert {s.global_shape for s in shards if s.key.endswith(QKV)} == {(2, 16, 8)}


def test_gate_and_up_are_two_shards_of_one_local_tensor():
    shards = describe_rank(FIELDS, ParallelLayout(tp_size=2), 1)
    local = "0.decoder.layers.1.mlp.linear_fc1.weight"
    key, whole = "decoder.layers.mlp.linear_fc1.weight", (2, 32, 8)
    assert [s for s in shards if s.local_name == local] == [
        TensorShard(key, whole, Box((1, 8, 0), (1, 8, 8)), "float32", local, (0, 0)),
        TensorShard(key, whole, Box((1, 24, 0), (1, 8, 8)), "float32", local, (8, 0)),
    ]


def test_the_padding_of_the_vocabulary_is_left_out():
    fields = {**FIELDS, "make_vocab_size_divisible_by": 4}
    ranks = describe_layout(fields, ParallelLayout(tp_size=4))
    held = [holdings(shards, EMBEDDING) for shards in ranks]
    assert held == [[((0, 0), (4, 8))], [((4, 0), (4, 8))], [((8, 0), (2, 8))], []]
    assert ranks[0][0].global_shape == (10, 8)


def test_tied_embeddings_lie_on_the_first_and_the_last_stage():
    fields = {**FIELDS, "untie_embeddings_and_output_weights": False}
    one = describe_rank(fields, ParallelLayout(), 0)
    first, last = describe_layout(fields, ParallelLayout(pp_size=2))
    names = [[s.local_name for s in shards if s.key == EMBEDDING] for shards in (one, first, last)]
    assert names == [[f"0.{EMBEDDING}"], [f"0.{EMBEDDING}"], ["0.output_layer.weight"]]


def test_a_scalar_head_is_whole_on_every_rank():
    fields = {**FIELDS, "untie_embeddings_and_output_weights": False}
    for shards in describe_layout(fields, ParallelLayout(tp_size=2), head="scalar"):
        assert holdings(shards, "output_layer.weight") == [((0, 0), (1, 8))]


def test_data_parallel_ranks_share_one_description():
    ranks = describe_layout(FIELDS, ParallelLayout(tp_size=2, dp_size=3))
    assert all(ranks[rank] is ranks[rank % 2] for rank in range(6))
    assert ranks[0] is not ranks[1]
    assert ranks[1] == describe_rank(FIELDS, ParallelLayout(tp_size=2, dp_size=3), 5)


def test_experts_are_spread_over_the_ranks_of_a_stage():
    layout = ParallelLayout(tp_size=2, dp_size=4, ep_size=4, etp_size=1)
    ranks = describe_layout(MOE, layout)
    experts = [
        sorted({at[1] for at, _ in holdings(shards, "experts.linear_fc2.weight")})
        for shards in ranks
    ]
    assert experts == [[0], [1], [2], [3]] * 2
    assert ranks[0] is ranks[4]
    qkv = [holdings(shards, QKV)[0][0] for shards in ranks]
    assert qkv == [(0, 0, 0), (0, 8, 0)] * 4


def test_expert_tensor_ranks_cut_each_expert():
    layout = ParallelLayout(tp_size=2, dp_size=2, ep_size=2)
    held = [
        holdings(shards, "experts.linear_fc2.weight")[0] for shards in describe_layout(MOE, layout)
    ]
    assert held == [
        ((0, 0, 0, 0), (1, 1, 8, 3)),
        ((0, 0, 0, 3), (1, 1, 8, 3)),
        ((0, 2, 0, 0), (1, 1, 8, 3)),
        ((0, 2, 0, 3), (1, 1, 8, 3)),
    ]


def test_layers_of_two_kinds_have_keys_of_their_own():
    shards = describe_rank({**MOE, "moe_layer_freq": [0, 1]}, ParallelLayout(), 0)
    keys = {s.key for s in shards}
    assert "decoder.layers.0.mlp.linear_fc1.weight" in keys
    assert "decoder.layers.1.mlp.router.weight" in keys
    assert "decoder.layers.0.mlp.router.weight" not in keys


def test_transformer_engine_holds_a_norm_in_the_layer_behind_it():
    fields = {**MOE, "moe_layer_freq": [0, 1], "moe_grouped_gemm": True}
    shards = describe_rank(fields, ParallelLayout(dp_size=2, ep_size=2), 1, use_te=True)
    names = {s.local_name: s for s in shards}
    assert "0.decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "0.decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
    assert "0.decoder.layers.1.pre_mlp_layernorm.weight" in names
    expert = names["0.decoder.layers.1.mlp.experts.linear_fc2.weight1"]
    assert expert.key == "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
    assert (expert.box, expert.local_offset) == (Box((3, 0, 0), (1, 8, 6)), (0, 0))


def test_the_bias_that_balances_experts_stays_in_float32():
    fields = {**MOE, "bf16": True, "moe_router_enable_expert_bias": True}
    kinds = {s.key: s.dtype for s in describe_rank(fields, ParallelLayout(), 0)}
    assert kinds["decoder.layers.mlp.router.expert_bias"] == "float32"
    assert kinds["decoder.layers.mlp.router.weight"] == "bfloat16"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mtp_num_layers", 1),
        ("is_hybrid_model", True),
        ("moe_grouped_gemm", True),
        ("heterogeneous_block_specs", True),
        ("softmax_type", "learnable"),
    ],
)
def test_what_only_the_live_module_knows_is_refused_by_name(field, value):
    with pytest.raises(ConfigError, match=f"{field}: .* once they run"):
        describe_layout({**MOE, field: value}, ParallelLayout())


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"num_layers": None}, {}, "missing: num_layers"),
        ({}, {"tp_size": 3}, "num_attention_heads=4 is no multiple"),
        ({"num_attention_heads": 6, "num_query_groups": 3}, {"tp_size": 2}, "do not divide"),
        ({"ffn_hidden_size": 6}, {"tp_size": 4}, "linear_fc1.weight: 6 of"),
        ({}, {"dp_size": 3, "ep_size": 3}, "num_moe_experts=1 is no multiple"),
        ({"num_moe_experts": 4}, {"dp_size": 3, "ep_size": 2}, "stage has 3 ranks"),
        ({"moe_layer_freq": [1], "num_moe_experts": 4}, {}, "expected 2 numbers"),
        ({"normalization": "BatchNorm"}, {}, "expected RMSNorm or LayerNorm"),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_refused(changes, layout, message):
    with pytest.raises(ConfigError, match=message):
        describe_layout({**FIELDS, **changes}, ParallelLayout(**layout))


def test_a_model_that_generates_has_no_virtual_stages():
    with pytest.raises(ConfigError, match="no virtual stages"):
        describe_layout(FIELDS, ParallelLayout(pp_size=2, vpp_size=2), is_generating=True)


def test_describing_needs_neither_torch_nor_megatron():
    code = (
        "import sys, megatron_adapters.weights\n"
        "assert not {'torch', 'megatron.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
