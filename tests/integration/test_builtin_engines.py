"""Every built-in engine over real Megatron modules, in one process, from a config alone."""

import megatron_runs as runs
import pytest

import chatlearn
from chatlearn import Engine, Environment, Trainer
from chatlearn.config.schema import RuntimeConfig
from chatlearn.engine.from_config import build_engine
from chatlearn.engine.sample_managers import GroupAdvantageManager
from megatron_adapters import PolicyInference, PolicyTrainer

LOCAL_REWARD = {"module": "megatron_runs:LengthReward"}


def learn(tmp_path, content, dataset, eval_dataset=None):
    content["runtime"] |= {"backend": "local", "output_dir": str(tmp_path), "debug": True}
    content["runtime"].setdefault("train_micro_batch_size", 4)
    engine = build_engine(chatlearn.init(content)).set_dataset(dataset)
    if eval_dataset is not None:
        engine.evaluator.set_dataset(eval_dataset)
    return engine.learn()


def test_ppo_reports_what_a_user_watches(tmp_path):
    names = ("policy", "reference", "value", "policy_trainer", "value_trainer")
    runtime = {
        "num_episode": 2,
        "sample_per_episode": 8,
        "train_global_batch_size": 4,
        "num_training_epoch": 2,
        "validate_param_sync": True,
    }
    content = runs.config("rlhf", names, runtime, reward=LOCAL_REWARD)
    result = learn(tmp_path, content, runs.prompts(10), runs.prompts(5))
    last = result.metrics[-1]
    assert len(result.metrics) == 2
    for name in ("kl", "clip_fraction", "entropy", "logprob_gap", "grad_norm"):
        assert f"train/policy_trainer/{name}" in last
    assert "train/value_trainer/explained_variance" in last
    assert last["rollout/response_length"] >= 1
    assert last["rollout/reward"] == -last["rollout/response_length"]
    assert last["rollout/tokens_per_s"] > 0
    assert len(result.evaluation["reward"]) == 5


def test_grpo_trains_on_group_advantages(tmp_path):
    runtime = {"sample_per_episode": 3, "num_samples_per_prompt": 4, "num_episode": 2}
    names = ("policy", "reference", "policy_trainer")
    content = runs.config("grpo", names, runtime, reward=LOCAL_REWARD)
    result = learn(tmp_path, content, runs.prompts(6))
    assert result.metrics[-1]["train/policy_trainer/num_tokens"] > 0
    first = result.metrics[0]
    assert (first["train/policy_trainer/ratio_gap"], first["train/policy_trainer/update_kl"]) == (
        0.0,
        0.0,
    )
    # With one update in an episode nothing is scored twice.
    assert "time/train/policy_trainer.prepare_episode" not in first


@pytest.mark.parametrize(
    ("change", "algorithm"),
    [
        ({"num_training_epoch": 2}, {}),
        ({"train_global_batch_size": 8}, {}),
        ({}, {"old_logprobs": "recompute"}),
        ({}, {"rollout_correction": "truncate", "rollout_correction_cap": 1.5}),
    ],
)
def test_old_logprobs_are_scored_where_the_algorithm_needs_them(tmp_path, change, algorithm):
    runtime = {"sample_per_episode": 4, "num_samples_per_prompt": 4, "debug": True, **change}
    names = ("policy", "reference", "policy_trainer")
    content = runs.config("grpo", names, {**runtime, "algorithm": algorithm}, reward=LOCAL_REWARD)
    first = learn(tmp_path, content, runs.prompts(6)).metrics[0]
    assert first["time/train/policy_trainer.prepare_episode"] > 0


def test_grpo_refuses_a_kl_in_the_reward(tmp_path):
    runtime = {"sample_per_episode": 2, "algorithm": {"kl_in": "reward"}}
    names = ("policy", "reference", "policy_trainer")
    content = runs.config("grpo", names, runtime, reward=LOCAL_REWARD)
    with pytest.raises(chatlearn.errors.ChatLearnError, match="use kl_in: loss"):
        learn(tmp_path, content, runs.prompts(4))


def test_dpo_learns_to_prefer_the_chosen_responses(tmp_path):
    runtime = {"num_episode": 8, "train_global_batch_size": 8}
    content = runs.config("dpo", ("reference", "policy_trainer"), runtime)
    result = learn(tmp_path, content, runs.pairs(8))
    losses = [entry["train/policy_trainer/loss"] for entry in result.metrics]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)
    assert losses[-1] < losses[0]
    assert result.metrics[-1]["train/policy_trainer/accuracy"] == 1.0


def test_online_dpo_makes_pairs_of_its_own_samples(tmp_path):
    runtime = {"sample_per_episode": 6, "num_samples_per_prompt": 4}
    names = ("policy", "reference", "policy_trainer")
    content = runs.config("online_dpo", names, runtime, reward=LOCAL_REWARD)
    result = learn(tmp_path, content, runs.prompts(6))
    assert result.metrics[0]["relay/skipped"] == 0.0
    assert 0 < result.metrics[0]["relay/kept_pairs"] <= 1
    assert result.metrics[0]["train/policy_trainer/num_pairs"] <= 6


def test_online_dpo_leaves_an_episode_out_whose_rewards_all_tie(tmp_path):
    runtime = {"sample_per_episode": 3, "num_samples_per_prompt": 2, "num_episode": 2}
    names = ("policy", "reference", "policy_trainer")
    reward = {"module": "megatron_runs:EvenReward"}
    content = runs.config("online_dpo", names, runtime, reward=reward)
    result = learn(tmp_path, content, runs.prompts(6))
    assert [metrics["relay/skipped"] for metrics in result.metrics] == [1.0, 1.0]
    assert not any(name.startswith("train/") for name in result.metrics[-1])


def test_debug_mode_finds_a_ratio_that_is_not_one(tmp_path):
    trainer = {"module": "megatron_runs:ForgetfulTrainer"}
    names = ("policy", "reference", "policy_trainer")
    runtime = {"sample_per_episode": 2, "num_samples_per_prompt": 2, "num_training_epoch": 2}
    content = runs.config("grpo", names, runtime, reward=LOCAL_REWARD, policy_trainer=trainer)
    message = "the ratio differs from 1 by .*; expected exactly 1 and at most 1e-08"
    with pytest.raises(chatlearn.errors.ChatLearnError, match=message):
        learn(tmp_path, content, runs.prompts(4))


def test_without_a_reference_there_is_no_kl_to_it(tmp_path):
    policy, reward = PolicyInference("policy"), runs.LengthReward("reward")
    trainer = PolicyTrainer("policy_trainer")
    engine = Engine(
        Environment(lambda batch: reward.forward_step(policy.forward_step(batch))),
        Trainer(lambda batch: trainer.train_step(batch)),
    ).set_relay_sample_manager(GroupAdvantageManager())
    runtime = {"backend": "local", "output_dir": str(tmp_path), "algorithm": {"kl_coef": 0}}
    chatlearn.init(runs.config(None, ("policy", "policy_trainer"), runtime))
    metrics = engine.set_dataset(runs.prompts(4)).learn().metrics[0]
    assert "train/policy_trainer/update_kl" in metrics
    assert "train/policy_trainer/kl" not in metrics


@pytest.mark.parametrize(
    ("columns", "num_updates", "is_wanted"),
    [("rewards", 2, True), ("rewards", 1, False), ("chosen_token_ids", 2, False)],
)
def test_only_ppo_of_several_updates_sees_the_episode_first(columns, num_updates, is_wanted):
    trainer = PolicyTrainer("policy_trainer")
    trainer.needs_whole_episode = True
    trainer._runtime_args, trainer.num_updates = RuntimeConfig(), num_updates
    assert trainer.wants_whole_episode(["prompt_token_ids", columns]) is is_wanted


def test_dpo_prepares_no_episode(tmp_path):
    content = runs.config("dpo", ("reference", "policy_trainer"), {"train_global_batch_size": 4})
    result = learn(tmp_path, content, runs.pairs(8))
    assert "prepare_episode" not in (result.run_dir / "timeline.json").read_text()


def test_eval_runs_each_model_over_what_the_one_before_gave(tmp_path):
    content = runs.config("eval", ("policy",), {}, reward=LOCAL_REWARD)
    result = learn(tmp_path, content, runs.prompts(7))
    assert len(result.evaluation["reward"]) == 7
    assert "eval/reward" in result.metrics[-1]


def test_a_prompt_beyond_the_context_is_refused_by_its_number(tmp_path):
    content = runs.config("eval", ("policy",), {}, reward=LOCAL_REWARD)
    dataset = [*runs.prompts(2), {"prompt_token_ids": list(range(3, 19))}]
    message = "prompt 2 has 16 tokens; with max_sequence_length=16 a prompt may have at most 15"
    with pytest.raises(chatlearn.errors.ChatLearnError, match=message):
        learn(tmp_path, content, dataset)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    reward = {"module": "megatron_runs:InfiniteReward"}
    names = ("policy", "reference", "value", "policy_trainer", "value_trainer")
    content = runs.config("rlhf", names, {"sample_per_episode": 4}, reward=reward)
    with pytest.raises(chatlearn.errors.ChatLearnError, match="the loss is nan"):
        learn(tmp_path, content, runs.prompts(4))


def test_a_trainer_names_the_column_that_is_missing(tmp_path):
    content = runs.config("dpo", ("reference", "policy_trainer"), {"algorithm": {"loss": "ppo"}})
    message = "missing: response_token_ids, .*; the batch has prompt_token_ids, chosen"
    with pytest.raises(chatlearn.errors.ChatLearnError, match=message):
        learn(tmp_path, content, runs.pairs(4))


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    content = runs.config("eval", ("policy",), {}, reward=LOCAL_REWARD)
    message = "got the token id 23; the model's vocab_size is 23"
    with pytest.raises(chatlearn.errors.ChatLearnError, match=message):
        learn(tmp_path, content, [{"prompt_token_ids": [3, 23]}])
