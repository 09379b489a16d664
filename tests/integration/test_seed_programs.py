"""The programs of the user guide, as a user writes them."""

# ruff: noqa: RET504 - the guide assigns before it returns

from __future__ import annotations

import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.engine import state

NUM_PROMPTS = 6
train_prompts = [f"prompt {number}" for number in range(NUM_PROMPTS)]
val_prompts = [f"question {number}" for number in range(5)]


class PolicyInference(BaseModule):
    def setup(self):
        self.model = torch.nn.Linear(2, 2)

    def forward_step(self, data):
        return {"prompt": data["prompt"], "response": [text + "!" for text in data["prompt"]]}

    eval_step = forward_step


class PolicyReference(BaseModule):
    def forward_step(self, data):
        return {"prompt": data["prompt"], "ref": [float(len(text)) for text in data["prompt"]]}

    eval_step = forward_step


class ValueInference(PolicyInference):
    def forward_step(self, data):
        return {"values": [0.5 for _ in data["response"]]}


class RewardInference(BaseModule):
    def forward_step(self, data):
        rewards = [
            float(r == p + "!") for r, p in zip(data["response"], data["prompt"], strict=True)
        ]
        return {"prompt": data["prompt"], "ref": data["ref"], "rewards": rewards}

    def eval_step(self, data):
        return {"response": data["response"], "rewards": [1.0 for _ in data["response"]]}


class PolicyTrainer(BaseModule):
    def setup(self):
        self.model = torch.nn.Linear(2, 2)

    def train_step(self, data):
        return {"rows": sum(len(part["prompt"]) for part in data)}


class ValueTrainer(PolicyTrainer):
    pass


class CustomEngine(Engine):
    def __init__(self, reference: BaseModule, policy_trainer: BaseModule):
        def env_flow(batch):
            ref_out = reference.forward_step(batch)
            return ref_out

        def trainer_flow(batch):
            policy_trainer.train_step(batch)

        env = Environment(env_flow)
        trainer = Trainer(trainer_flow)
        super().__init__(env, trainer)


@pytest.fixture
def no_init(monkeypatch, tmp_path, ray_cluster):
    monkeypatch.setattr(state._STATE, "config", None)
    monkeypatch.chdir(tmp_path)


def test_custom_engine_learns_without_init(no_init, tmp_path):
    reference = PolicyReference("reference")
    ppo_policy = PolicyTrainer("policy_trainer")

    engine = CustomEngine(reference, ppo_policy) \
             .set_dataset(train_prompts)  # fmt: skip
    result = engine.learn()

    assert result.run_dir.resolve().is_relative_to((tmp_path / "runs" / "chatlearn").resolve())
    assert {"config.yaml", "metrics.jsonl", "timeline.json", "logs"} <= {
        path.name for path in result.run_dir.iterdir()
    }
    assert [episode["train/policy_trainer/rows"] for episode in result.metrics] == [NUM_PROMPTS]
    assert result.rollouts == []


def test_custom_engine_takes_an_evaluator_afterwards(no_init):
    reference = PolicyReference("reference")
    ppo_policy = PolicyTrainer("policy_trainer")

    def eval_flow(batch):
        r0 = reference.eval_step(batch)
        return r0

    evaluator = Evaluator(eval_flow).set_dataset(val_prompts)
    engine = CustomEngine(reference, ppo_policy) \
             .set_evaluator(evaluator) \
             .set_dataset(train_prompts)  # fmt: skip
    result = engine.learn()

    assert [row["prompt"] for row in result.evaluation["reference"]] == val_prompts
    assert result.metrics[-1]["train/policy_trainer/rows"] == NUM_PROMPTS


def test_engine_of_six_models_with_two_syncs(ray_cluster, tmp_path):
    chatlearn.init({"runtime": {"output_dir": str(tmp_path), "num_episode": 2}})
    policy = PolicyInference("policy")
    value = ValueInference("value")
    reference = PolicyReference("reference")
    reward = RewardInference("reward")
    ppo_policy = PolicyTrainer("ppo_policy")
    ppo_value = ValueTrainer("ppo_value")

    def env_flow(batch):
        policy_out = policy.forward_step(batch)
        ref_out = reference.forward_step(policy_out)
        value_out = value.forward_step(policy_out)
        reward_out = reward.forward_step(policy_out, ref_out, value_out)
        return reward_out

    def trainer_flow(batch):
        ppo_policy.train_step(batch)
        ppo_value.train_step(batch)

    def eval_flow(batch):
        r0 = policy.eval_step(batch)
        r1 = reward.eval_step(r0)
        return r1

    env = Environment(env_flow)

    trainer = Trainer(trainer_flow)

    evaluator = Evaluator(eval_flow).set_dataset(val_prompts)

    engine = Engine(env, trainer, evaluator) \
             .set_parameter_sync(ppo_policy, policy) \
             .set_parameter_sync(ppo_value, value) \
             .set_dataset(train_prompts)  # fmt: skip
    result = engine.learn()

    assert [episode["rollout/reward"] for episode in result.metrics] == [1.0, 1.0]
    assert [row["response"] for row in result.evaluation["reward"]] == [
        p + "!" for p in val_prompts
    ]
    assert result.metrics[-1]["eval/reward"] == 1.0
    assert {"sync/policy/bytes", "sync/value/bytes"} <= result.metrics[-1].keys()
