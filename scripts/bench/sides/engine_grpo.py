"""GRPO steps of this project: a `GRPOEngine`, run by its configuration."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

import chatlearn
from chatlearn import BaseModule, GRPOEngine
from megatron_adapters import PolicyInference, PolicyReference, PolicyTrainer
from scripts.bench.sides.gate import Gate, StepGate, parse_side_arguments
from scripts.bench.sides.megatron_world import resolve_dtype
from scripts.bench.workload import EOS, Shape, draw_tokens

_NUM_PROMPTS = 512
_REWARDED = 13


class GatedReward(BaseModule):
    """Counts one token in each response; in `before_episode` it waits for the benchmark."""

    def setup(self) -> None:
        """Connect to the benchmark."""
        self._left = self.runtime_args.num_episode
        self._gate = StepGate(Gate(self.model_args["address"]))
        self._gate.greet_with(**self.model_args["hello"])

    def before_episode(self) -> None:
        """Wait until a step is ordered; the last episode is there for the end of the last wait.

        Raises:
            SystemExit: the benchmark ends before the run does.
        """
        self._left -= 1
        if not self._gate.before_step() and self._left:
            raise SystemExit("the benchmark is over")

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Adds `rewards`."""
        responses = data["response_token_ids"]
        self._gate.count(samples=len(responses), tokens=sum(len(ids) for ids in responses))
        rewards = [float((torch.as_tensor(ids) == _REWARDED).sum()) for ids in responses]
        return {**data, "rewards": rewards}


def build_config(options: dict[str, Any], address: str) -> dict[str, Any]:
    """The configuration of the run: three Megatron models and the reward."""
    shape = Shape(**options["shape"])
    stop = [EOS] if options["is_variable"] else []
    model = {**shape.as_fields(), "pretrained": options["weights"], "num_gpu": 1}
    generation = {
        "max_new_tokens": options["new_tokens"],
        "num_slots": options["num_slots"],
        "stop_token_ids": stop,
    }
    hello = {"num_parameters": shape.num_parameters, "dtype": resolve_dtype(shape)}
    algorithm = {"kl_coef": options["kl_coef"], **options["algorithm"]}
    return {
        "models": {
            "policy": {**model, "generation": generation},
            "reference": model,
            "policy_trainer": {**model, "lr": options["lr"], "weight_decay": 0.0},
            "reward": {"num_cpu": 1, "args": {"address": address, "hello": hello}},
        },
        "runtime": {
            "backend": options["backend"],
            "num_episode": options["num_steps"],
            "sample_per_episode": options["num_prompts"],
            "num_samples_per_prompt": options["num_samples"],
            "train_micro_batch_size": options["micro_batch_size"],
            "algorithm": algorithm,
            "output_dir": options["output_dir"],
            "enable_tensorboard": False,
        },
    }


def main() -> int:
    """Run as many steps as the benchmark will order, and one more for the last wait."""
    given = parse_side_arguments()
    options = given.options
    shape = Shape(**options["shape"])
    torch.set_num_threads(options["num_threads"])
    chatlearn.init(build_config(options, given.address))
    draw = random.Random(0)
    prompts = [
        {"prompt_token_ids": draw_tokens(draw, options["prompt_length"], shape.vocab_size)}
        for _ in range(_NUM_PROMPTS)
    ]
    engine = GRPOEngine(
        PolicyInference("policy"),
        PolicyReference("reference"),
        GatedReward("reward"),
        PolicyTrainer("policy_trainer"),
    )
    engine.set_dataset(prompts).learn()
    return 0


if __name__ == "__main__":
    # Ray's workers find the reward by its module's name, which `__main__` is not.
    from scripts.bench.sides.engine_grpo import main as run

    sys.exit(run())
