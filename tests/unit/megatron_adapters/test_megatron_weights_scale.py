"""Models of hundreds of billions of parameters on thousands of ranks are described in seconds."""

import time
from math import prod
from pathlib import Path

import pytest
import yaml

from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.weights import describe_layout

MODELS = Path(__file__).resolve().parents[3] / "configs" / "models"
DEEPSEEK_V3 = yaml.safe_load((MODELS / "deepseek_v3.yaml").read_text())
UNEVEN = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2}
LLAMA_405B = {
    **yaml.safe_load((MODELS / "llama_405b.yaml").read_text()),
    "num_layers_in_first_pipeline_stage": 7,
    "num_layers_in_last_pipeline_stage": 7,
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
