"""Models of hundreds of billions of parameters on thousands of ranks are described in seconds."""

import time
from math import prod

import pytest

from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.weights import describe_layout

DEEPSEEK_V3 = {
    "num_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "vocab_size": 129280,
    "max_sequence_length": 4096,
    "ffn_hidden_size": 18432,
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
    "qk_layernorm": True,
    "num_moe_experts": 256,
    "moe_ffn_hidden_size": 2048,
    "moe_shared_expert_intermediate_size": 2048,
    "moe_layer_freq": [0] * 3 + [1] * 58,
    "moe_router_enable_expert_bias": True,
    "bf16": True,
}
UNEVEN = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2}
LLAMA_405B = {
    "num_layers": 126,
    "hidden_size": 16384,
    "num_attention_heads": 128,
    "num_query_groups": 8,
    "ffn_hidden_size": 53248,
    "vocab_size": 128256,
    "max_sequence_length": 4096,
    "num_layers_in_first_pipeline_stage": 7,
    "num_layers_in_last_pipeline_stage": 7,
    "bf16": True,
}
TRAINING = ParallelLayout(tp_size=8, pp_size=16, dp_size=16, ep_size=64, etp_size=1)
SERVING = ParallelLayout(tp_size=8, dp_size=4, ep_size=32, etp_size=1)


def count_deepseek_v3():
    """Parameters from first principles, with the routers' balancing biases."""
    hidden, heads, latent = 7168, 128, 512
    query = hidden * 1536 + 1536 + 1536 * heads * (128 + 64)
    keys = hidden * (latent + 64) + latent + latent * heads * (128 + 128)
    attention = query + keys + heads * 128 * hidden + 2 * hidden
    dense = 3 * hidden * 18432
    mixture = (256 + 1) * 3 * hidden * 2048 + 256 * hidden + 256
    edges = 2 * 129280 * hidden + hidden
    return 61 * attention + 3 * dense + 58 * mixture + edges


def distinct_boxes(ranks):
    """Boxes of each tensor, those that several ranks hold once; and the tensors' shapes."""
    boxes, shapes = {}, {}
    for shards in {id(each): each for each in ranks}.values():
        for shard in shards:
            boxes.setdefault(shard.key, set()).add(shard.box)
            assert shapes.setdefault(shard.key, shard.global_shape) == shard.global_shape
    return boxes, shapes


def assert_partition(ranks):
    """The boxes of a tensor lie on one grid and cover it; the number of all elements."""
    boxes, shapes = distinct_boxes(ranks)
    for key, held in boxes.items():
        shape = next(iter(held)).shape
        assert {box.shape for box in held} == {shape}
        assert not any(at % n for box in held for at, n in zip(box.offset, shape, strict=True))
        assert len(held) * prod(shape) == prod(shapes[key]), key
    return sum(map(prod, shapes.values()))


@pytest.mark.parametrize(
    ("fields", "layout", "num_descriptions"),
    [({**DEEPSEEK_V3, **UNEVEN}, TRAINING, 16 * 64), (DEEPSEEK_V3, SERVING, 32)],
)
def test_deepseek_v3_is_described_whole(fields, layout, num_descriptions):
    start = time.process_time()
    ranks = describe_layout(fields, layout)
    assert time.process_time() - start < 10
    assert len(ranks) == layout.world_size
    assert len({id(shards) for shards in ranks}) == num_descriptions
    assert assert_partition(ranks) == count_deepseek_v3() == 671_026_419_200


def test_llama_405b_is_described_whole():
    start = time.process_time()
    ranks = describe_layout(LLAMA_405B, ParallelLayout(tp_size=8, pp_size=16, dp_size=8))
    assert time.process_time() - start < 5
    assert len(ranks) == 1024
    assert len({id(shards) for shards in ranks}) == 128
    assert assert_partition(ranks) == 405_853_388_800
