"""PPO over Megatron models in Ray goes on from a checkpoint, at the same layout and at others."""

from __future__ import annotations

import json

import megatron_runs as runs
import pytest
import torch

import chatlearn
from chatlearn.engine.from_config import build_engine
from chatlearn.metrics.timings import without_timings

pytestmark = pytest.mark.alone

RUNTIME = {
    "num_episode": 3,
    "sample_per_episode": 6,
    "generation_batch_size": 3,
    "train_global_batch_size": 4,
    "train_micro_batch_size": 2,
    "deterministic": True,
    "save_episode_interval": 1,
    "stage_timeout_s": 120,
    "enable_tensorboard": False,
}
LAYOUTS = {
    "policy": {"num_gpu": 2, "tensor_model_parallel_size": 2},
    "reference": {"sync_frequency": 0},
    "policy_trainer": {"num_gpu": 2, "use_distributed_optimizer": True, "hidden_dropout": 0.1},
    "value_trainer": {"num_gpu": 2, "pipeline_model_parallel_size": 2},
}
OTHER_LAYOUTS = {
    "policy": {},
    "reference": {"sync_frequency": 0},
    "policy_trainer": {
        "num_gpu": 2,
        "tensor_model_parallel_size": 2,
        "use_distributed_optimizer": True,
    },
    "value_trainer": {},
}
NAMES = ("policy", "reference", "value", "policy_trainer", "value_trainer")
TRAINED = ("policy_trainer", "value_trainer")


@pytest.fixture
def learn(ray_cluster, tmp_path):
    def run(layouts, **runtime):
        content = runs.config("rlhf", NAMES, {**RUNTIME, **runtime}, reward=runs.REWARD, **layouts)
        content["runtime"]["output_dir"] = str(tmp_path)
        return build_engine(chatlearn.init(content)).set_dataset(runs.prompts(10)).learn()

    return run


def lines(result):
    return [
        without_timings(json.loads(line))
        for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_resumed_run_is_bit_identical(learn):
    whole = learn(LAYOUTS)
    again = learn(LAYOUTS, resume=str(whole.run_dir / "checkpoints/episode_000001"))
    assert lines(again) == lines(whole)
    expected, found = (runs.saved_tensors(r.run_dir, 3, TRAINED) for r in (whole, again))
    assert len(expected) > 40
    assert expected.keys() == found.keys()
    different = [name for name, value in expected.items() if not torch.equal(value, found[name])]
    assert different == []


@pytest.mark.long
def test_at_another_layout_the_data_is_the_same_and_the_numbers_are_equal(learn):
    layouts = {**LAYOUTS, "policy_trainer": {"num_gpu": 2, "use_distributed_optimizer": True}}
    whole = learn(layouts)
    again = learn(OTHER_LAYOUTS, resume=str(whole.run_dir / "checkpoints/episode_000001"))
    for expected, found in zip(lines(whole), lines(again), strict=True):
        moved = {name for name in expected if name.startswith("sync/")}
        for name in expected.keys() - moved:
            assert found[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-5), name
