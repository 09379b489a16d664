"""PPO over five Megatron models of different layouts and a verifier, in Ray."""

import megatron_runs as runs
import pytest

import chatlearn
import megatron_adapters
from chatlearn.engine.from_config import build_engine

pytestmark = pytest.mark.alone

RUNTIME = {
    "num_episode": 2,
    "sample_per_episode": 8,
    "generation_batch_size": 3,
    "train_global_batch_size": 4,
    "train_micro_batch_size": 2,
    "debug": True,
    "deterministic": True,
    "validate_param_sync": True,
    "save_episode_interval": 2,
    "enable_eval_before_training": True,
}
LAYOUTS = {
    "policy": {"num_gpu": 2, "tensor_model_parallel_size": 2},
    "policy_trainer": {"num_gpu": 2, "use_distributed_optimizer": True},
    "value_trainer": {"num_gpu": 2, "pipeline_model_parallel_size": 2},
}


def test_ppo_over_tensor_pipeline_and_data_ranks(ray_cluster, tmp_path):
    names = ("policy", "reference", "value", "policy_trainer", "value_trainer")
    content = runs.config("rlhf", names, RUNTIME, reward=runs.REWARD, **LAYOUTS)
    content["runtime"]["output_dir"] = str(tmp_path)
    engine = build_engine(chatlearn.init(content)).set_dataset(runs.prompts(10))
    engine.evaluator.set_dataset(runs.prompts(7))
    result = engine.learn()
    assert [entry["step"] for entry in result.metrics] == [0, 1, 2]
    assert result.metrics[1]["train/policy_trainer/logprob_gap"] < 1e-4
    assert len(result.evaluation["reward"]) == 7
    saved = result.run_dir / "checkpoints" / "episode_000002" / "models"
    assert (saved / "policy_trainer" / "metadata.json").is_file()
    assert (saved / "value_trainer" / "metadata.json").is_file()


def sample(tmp_path, **policy):
    """Two samples of each prompt, without training."""
    runtime = {"deterministic": True, "num_samples_per_prompt": 2, "generation_batch_size": 3}
    content = runs.config(None, ("policy",), {**runtime, "output_dir": str(tmp_path)})
    content["models"]["policy"] |= policy
    chatlearn.init(content)
    model = megatron_adapters.PolicyInference("policy")
    engine = chatlearn.Engine(chatlearn.Environment(lambda batch: model.forward_step(batch)))
    rollouts = engine.set_dataset(runs.prompts(7)).learn().rollouts
    return [row["response_token_ids"].tolist() for row in rollouts]


def test_tokens_do_not_depend_on_replicas_or_batches(ray_cluster, tmp_path):
    two_replicas = sample(tmp_path, num_gpu=2)
    one_of_two_ranks = sample(
        tmp_path, num_gpu=2, tensor_model_parallel_size=2, generation_batch_size=5
    )
    assert len(two_replicas) == 14
    assert len({tuple(ids) for ids in two_replicas}) > 7
    assert two_replicas == one_of_two_ranks
