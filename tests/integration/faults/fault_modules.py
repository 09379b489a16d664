"""Plain modules that hurt themselves once, at a named moment, and a flow that shows what was lost.

A moment is a file in `args["folder"]`: whoever is to suffer removes it, and does what it says.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch

from chatlearn import BaseModule, Engine, Environment, Evaluator
from chatlearn import Trainer as TrainerFlow


def plan_fault(folder, moment, kind):
    """Let the first worker that comes to `moment` suffer `kill`, `stop` or `raise`.

    `kind and moment kind` plans another before it strikes.
    """
    (Path(folder) / moment).write_text(kind)


class Hurt(BaseModule):
    """Suffers at the moments `<its name>.<where>`, optionally only from some episode on."""

    def suffer(self, where):
        path = Path(self.args["folder"]) / f"{self.name}.{where}"
        try:
            kind = path.read_text()
            path.unlink()
        except FileNotFoundError:
            return
        kind, _, following = kind.partition(" and ")
        if following:
            plan_fault(self.args["folder"], *following.split())
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "raise":
            raise ValueError("told to raise")


class HurtPolicy(Hurt):
    """Answers with its weight and the prompt."""

    def setup(self):
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.suffer("setup")

    def forward_step(self, data):
        self.suffer("forward")
        weight = self.model.weight.item()
        self.suffer(f"forward{self.version_now()}")
        return {**data, "answer": [float(p) + weight for p in data["prompt"]]}

    def version_now(self):
        return self.policy_version

    def eval_step(self, data):
        self.suffer("eval")
        return {**data, "rewards": [float(p) + self.model.weight.item() for p in data["prompt"]]}

    def after_weight_sync(self, version):
        super().after_weight_sync(version)
        self.suffer(f"sync{version}")


class HurtReward(Hurt):
    """Half of the answer."""

    def forward_step(self, data):
        self.suffer("forward")
        return {**data, "rewards": [value / 2 for value in data["answer"]]}


class HurtTrainer(Hurt):
    """Adds the mean reward, and notes what it was trained on."""

    def setup(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)

    def train_step(self, data, iteration):
        self.suffer("train")
        self.suffer(f"train{iteration}")
        values = [float(r) for part in data for r in part["rewards"]]
        loss = (self.model.weight - sum(values) / len(values)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        ids = [[r.prompt, r.sample] for part in self.row_ids for r in part]
        note = {"iteration": iteration, "ids": ids, "values": values}
        with (self.run_dir / "trained.jsonl").open("a") as file:
            file.write(json.dumps(note) + "\n")
        return {"loss": loss.item()}

    def save_checkpoint(self, iteration):
        self.suffer("save")
        super().save_checkpoint(iteration)


def build(folder, num_prompts=12, reward=HurtReward):
    arguments = {"folder": str(folder)}
    policy = HurtPolicy("policy", arguments)
    reward = reward("reward", arguments)
    trainer = HurtTrainer("trainer", arguments)
    engine = Engine(
        Environment(lambda b: reward.forward_step(policy.forward_step(b))),
        TrainerFlow(lambda b: trainer.train_step(b)),
        Evaluator(lambda b: policy.eval_step(b)).set_dataset([1, 2, 3]),
    )
    return engine.set_dataset(list(range(num_prompts))).set_parameter_sync(trainer, policy)


SETTINGS = {
    "num_episode": 3,
    "sample_per_episode": 6,
    "generation_batch_size": 2,
    "train_global_batch_size": 3,
    "train_micro_batch_size": 3,
    "save_episode_interval": 1,
    "eval_episode_interval": 1,
    "deterministic": True,
    "max_restarts": 2,
    "heartbeat_timeout_s": 3,
}


def trained(run_dir):
    """What was trained on, in the end: a repeated iteration counts as its last time."""
    notes = [json.loads(line) for line in (run_dir / "trained.jsonl").read_text().splitlines()]
    return {note["iteration"]: (note["ids"], note["values"]) for note in notes}
