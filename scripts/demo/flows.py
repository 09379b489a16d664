"""The demo's flows, written as a user writes them, and built from a config's models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn import Engine, Environment, Evaluator, Trainer
from chatlearn.engine.sample_managers import GroupAdvantageManager
from megatron_adapters import (
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
    RewardTrainer,
    ValueInference,
    ValueTrainer,
)
from scripts.demo.problems import Problem
from scripts.demo.verifier import BoundedReward, RuleVerifier

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatlearn import BaseModule
    from chatlearn.config import Config

__all__ = [
    "AdditionEvaluator",
    "build_grpo",
    "build_ppo",
    "build_reward_training",
    "build_sampling",
    "build_warm_start",
]


class AdditionEvaluator(Evaluator):
    """Reports the share of held-out problems that were solved."""

    def post_process(
        self, results: Mapping[str, Sequence[dict[str, Any]]], eval_info: Mapping[str, int]
    ) -> dict[str, float]:
        """`exact_match`, `right_or_carry_free` and, with a reward model, its mean `reward`."""
        del eval_info
        rows = next(iter(results.values()))
        metrics = {
            "exact_match": _mean(rows, "exact_match"),
            "right_or_carry_free": sum(map(_is_right_or_carry_free, rows)) / len(rows),
        }
        if "reward_score" in rows[0]:
            metrics["reward"] = _mean(rows, "reward_score")
        return metrics


def build_warm_start(config: Config) -> Engine:
    """Supervised training: a trainer straight on the data set."""
    del config
    warm_start = PolicyTrainer("warm_start")

    def trainer_flow(batch: Any) -> None:
        warm_start.train_step(batch)

    return Engine(None, Trainer(trainer_flow), name="warm start")


def build_sampling(config: Config) -> Engine:
    """Rollouts only: the policy answers, the verifier judges; `learn()` gives the rows."""
    del config
    policy, verifier = PolicyInference("policy"), RuleVerifier("verifier")

    def env_flow(batch: Any) -> Any:
        return verifier.forward_step(policy.forward_step(batch))

    return Engine(Environment(env_flow), name="sampling")


def build_reward_training(config: Config) -> Engine:
    """The reward model learns from pairs of answers."""
    del config
    reward_trainer = RewardTrainer("reward_trainer")

    def trainer_flow(batch: Any) -> None:
        reward_trainer.train_step(batch)

    return Engine(None, Trainer(trainer_flow), name="reward training")


def build_ppo(config: Config) -> Engine:
    """PPO: five Megatron models and a verifier; with a model called `reward`, six."""
    policy = PolicyInference("policy")
    reference = PolicyReference("reference")
    value = ValueInference("value")
    policy_trainer = PolicyTrainer("policy_trainer")
    value_trainer = ValueTrainer("value_trainer")
    verifier, judge = _build_judges(config)

    def env_flow(batch: Any) -> Any:
        policy_out = policy.forward_step(batch)
        ref_out = reference.forward_step(policy_out)
        value_out = value.forward_step(policy_out)
        checked = verifier.forward_step(policy_out, ref_out, value_out)
        return checked if judge is None else judge.forward_step(checked)

    def trainer_flow(batch: Any) -> None:
        policy_trainer.train_step(batch)
        value_trainer.train_step(batch)

    engine = Engine(
        Environment(env_flow), Trainer(trainer_flow), _build_evaluator(policy, verifier, judge)
    )
    return engine.set_parameter_sync(policy_trainer, policy).set_parameter_sync(
        value_trainer, value
    )


def build_grpo(config: Config) -> Engine:
    """GRPO: advantages from the samples of one prompt, no critic."""
    policy = PolicyInference("policy")
    reference = PolicyReference("reference")
    policy_trainer = PolicyTrainer("policy_trainer")
    verifier, judge = _build_judges(config)

    def env_flow(batch: Any) -> Any:
        policy_out = policy.forward_step(batch)
        ref_out = reference.forward_step(policy_out)
        checked = verifier.forward_step(policy_out, ref_out)
        return checked if judge is None else judge.forward_step(checked)

    def trainer_flow(batch: Any) -> None:
        policy_trainer.train_step(batch)

    engine = Engine(
        Environment(env_flow), Trainer(trainer_flow), _build_evaluator(policy, verifier, judge)
    )
    manager = GroupAdvantageManager(config.runtime.algorithm.advantage_normalization)
    return engine.set_parameter_sync(policy_trainer, policy).set_relay_sample_manager(manager)


def _build_judges(config: Config) -> tuple[Any, Any]:
    """The verifier, and the reward model where the config has one.

    Within a flow a method takes several inputs, which its signature cannot say: hence `Any`.
    """
    if "reward" not in config.models:
        return RuleVerifier("verifier"), None
    return RuleVerifier("verifier", {"metric_only": True}), BoundedReward("reward")


def _build_evaluator(
    policy: BaseModule, verifier: BaseModule, judge: BaseModule | None
) -> AdditionEvaluator:
    def eval_flow(batch: Any) -> Any:
        checked = verifier.eval_step(policy.eval_step(batch))
        return checked if judge is None else judge.eval_step(checked)

    return AdditionEvaluator(eval_flow)


def _is_right_or_carry_free(row: Mapping[str, Any]) -> bool:
    problem = Problem.from_prompt(row["prompt"])
    return row["response"] in (problem.answer, problem.carry_free_answer)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)
