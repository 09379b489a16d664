"""Whole runs on one GPU that all models share; skipped where there is none."""

import megatron_runs as runs
import pytest
import torch

import chatlearn
from chatlearn.engine.from_config import build_engine

pytestmark = pytest.mark.gpu
NAMES = ("policy", "reference", "value", "policy_trainer", "value_trainer")
RUNTIME = {
    "num_episode": 4,
    "sample_per_episode": 8,
    "generation_batch_size": 4,
    "train_global_batch_size": 4,
    "train_micro_batch_size": 2,
    "validate_param_sync": True,
    "save_episode_interval": 2,
    "enable_eval_before_training": True,
    "profile": True,
}


def build(backend, folder, **runtime):
    content = runs.config("rlhf", NAMES, {**RUNTIME, **runtime}, reward=runs.REWARD)
    content["runtime"] |= {"output_dir": str(folder), "backend": backend}
    if backend == "ray":
        content["runtime"]["colocation"] = [",".join(NAMES)]
    engine = build_engine(chatlearn.init(content)).set_dataset(runs.prompts(10))
    engine.evaluator.set_dataset(runs.prompts(7))
    return engine


@pytest.fixture(params=["local", "ray"])
def backend(request):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


def test_ppo_trains_evaluates_saves_and_resumes(backend, tmp_path):
    whole = build(backend, tmp_path / "whole").learn()
    assert [entry["step"] for entry in whole.metrics] == [0, 1, 2, 3, 4]
    for entry in whole.metrics[1:]:
        assert entry["train/policy_trainer/logprob_gap"] < 1e-3
        assert entry["sync/policy/bytes"] > 0
    assert len(whole.evaluation["reward"]) == 7
    half = build(backend, tmp_path / "half", num_episode=2).learn()
    saved = half.run_dir / "checkpoints" / "episode_000002"
    resumed = build(backend, tmp_path / "rest", resume=str(saved)).learn()
    assert [entry["step"] for entry in resumed.metrics][-2:] == [3, 4]
    key = "train/policy_trainer/loss"
    assert resumed.metrics[-1][key] == pytest.approx(whole.metrics[-1][key], rel=1e-2, abs=1e-3)
