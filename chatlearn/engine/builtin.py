"""Ready-made engines: the usual flows over the same parts that users compose themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.engine.components import Environment, Evaluator, Trainer
from chatlearn.engine.engine import Engine
from chatlearn.engine.sample_managers import GroupAdvantageManager, PreferencePairManager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from chatlearn.models.base import BaseModule

__all__ = ["DPOEngine", "EvalEngine", "GRPOEngine", "OnlineDPOEngine", "RLHFEngine"]


class RLHFEngine(Engine):
    """PPO with a critic: rollout, reference, value and reward; two trainers."""

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule,
        reward: Any,
        value: BaseModule,
        policy_trainer: BaseModule,
        value_trainer: BaseModule,
    ) -> None:
        # In a flow a method takes several inputs, which its signature cannot say: `Any`.
        def env_flow(batch: Any) -> Any:
            policy_out = policy.forward_step(batch)
            ref_out = reference.forward_step(policy_out)
            value_out = value.forward_step(policy_out)
            reward_out = reward.forward_step(policy_out, ref_out, value_out)
            return value_out, reward_out  # the reward need not pass `values` on

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)
            value_trainer.train_step(batch)

        evaluator = _scored_evaluation(policy, reward)
        super().__init__(Environment(env_flow), Trainer(trainer_flow), evaluator, name="rlhf")
        self.set_parameter_sync(policy_trainer, policy)
        self.set_parameter_sync(value_trainer, value)


class GRPOEngine(Engine):
    """Group-relative policy optimisation: advantages from the samples of a prompt, no critic."""

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule,
        reward: BaseModule,
        policy_trainer: BaseModule,
    ) -> None:
        environment, trainer = _scored_rollout(policy, reference, reward, policy_trainer)
        super().__init__(environment, trainer, _scored_evaluation(policy, reward), name="grpo")
        self.set_parameter_sync(policy_trainer, policy)
        self.set_relay_sample_manager(GroupAdvantageManager())


class OnlineDPOEngine(Engine):
    """DPO on pairs that the policy samples itself: best against worst reward of each prompt."""

    def __init__(
        self,
        policy: BaseModule,
        reference: BaseModule,
        reward: BaseModule,
        policy_trainer: BaseModule,
    ) -> None:
        environment, trainer = _scored_rollout(policy, reference, reward, policy_trainer)
        evaluator = _scored_evaluation(policy, reward)
        super().__init__(environment, trainer, evaluator, name="online_dpo")
        self.set_parameter_sync(policy_trainer, policy)
        self.set_relay_sample_manager(PreferencePairManager())


class DPOEngine(Engine):
    """DPO on preference data as it is: the reference scores it, the trainer trains."""

    def __init__(self, reference: BaseModule, policy_trainer: BaseModule) -> None:
        def env_flow(batch: Any) -> Any:
            return reference.forward_step(batch)

        def trainer_flow(batch: Any) -> None:
            policy_trainer.train_step(batch)

        super().__init__(Environment(env_flow), Trainer(trainer_flow), name="dpo")


class EvalEngine(Engine):
    """Evaluation only."""

    def __init__(
        self,
        eval_flow: Callable[[Any], Any] | None = None,
        evaluator: Evaluator | None = None,
    ) -> None:
        if evaluator is None and eval_flow is not None:
            evaluator = Evaluator(eval_flow)
        super().__init__(None, None, evaluator, name="eval")

    @classmethod
    def over_models(cls, models: Mapping[str, BaseModule]) -> Self:
        """Each model's `eval_step` over what the one before it gave, in the config's order."""

        def eval_flow(batch: Any) -> Any:
            for model in models.values():
                batch = model.eval_step(batch)
            return batch

        return cls(eval_flow)

    def eval(self) -> dict[str, list[dict[str, Any]]]:
        """Evaluate; one dict per row in data-set order, for each returned model."""
        return self.learn().evaluation


def _scored_rollout(
    policy: BaseModule, reference: BaseModule, reward: Any, policy_trainer: BaseModule
) -> tuple[Environment, Trainer]:
    def env_flow(batch: Any) -> Any:
        policy_out = policy.forward_step(batch)
        ref_out = reference.forward_step(policy_out)
        return reward.forward_step(policy_out, ref_out)

    def trainer_flow(batch: Any) -> None:
        policy_trainer.train_step(batch)

    return Environment(env_flow), Trainer(trainer_flow)


class _ScoredEvaluation(Evaluator):
    """The policy's answers with their rewards, where there is evaluation data."""

    is_optional = True


def _scored_evaluation(policy: BaseModule, reward: BaseModule) -> Evaluator:
    def eval_flow(batch: Any) -> Any:
        return reward.eval_step(policy.eval_step(batch))

    return _ScoredEvaluation(eval_flow)
