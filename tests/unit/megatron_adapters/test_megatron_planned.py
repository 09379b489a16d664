"""What a Megatron module says of its config before any worker is up."""

import pytest

from chatlearn.config import load_config
from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters import PolicyInference, PolicyTrainer

SIZES = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 37,
    "max_sequence_length": 24,
}


def problems(kind=PolicyTrainer, layout=None, **fields):
    config = load_config({"models": {"m": {**SIZES, **fields}}}).model("m")
    return "; ".join(kind("m").find_problems(config, layout or ParallelLayout()))


def test_a_folder_to_write_needs_a_family_that_fits():
    assert "save_huggingface: a Hugging Face folder has a family" in problems(save_huggingface=True)
    assert "the model is no qwen3" in problems(save_huggingface=True, family="qwen3")
    assert "family: got 'lama'" in problems(save_huggingface=True, family="lama")
    assert problems(save_huggingface=True, family="llama2") == ""


@pytest.mark.parametrize(
    ("kind", "fields", "layout", "message"),
    [
        (PolicyInference, {}, ParallelLayout(), "lora is for a trained model"),
        (PolicyTrainer, {}, ParallelLayout(tp_size=4), "num_query_groups=2 to be a multiple of"),
        (
            PolicyTrainer,
            {"num_moe_experts": 4},
            ParallelLayout(tp_size=2, ep_size=2),
            "lora on experts needs expert_tensor_parallel_size: 1, got 2",
        ),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_name(kind, fields, layout, message):
    assert message in problems(kind, layout, lora={"rank": 2}, **fields)
    assert message not in problems(kind, layout, **fields)
