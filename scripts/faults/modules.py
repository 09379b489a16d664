"""Megatron modules of a tiny PPO run that suffer a fault when they are told to.

A fault is a file `<model>.<stage>` in the folder `models.<name>.args.moments`, with the kind of
fault as its content. The first rank that comes to that stage takes the file away and suffers.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chatlearn import BaseModule
from megatron_adapters import (
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
    ValueInference,
    ValueTrainer,
)

if TYPE_CHECKING:
    pass

__all__ = [
    "SoakPolicy",
    "SoakPolicyTrainer",
    "SoakReference",
    "SoakReward",
    "SoakValue",
    "SoakValueTrainer",
]

PAUSE_S = 2


def suffer(module: BaseModule, stage: str) -> None:
    """Do what the file for this model and stage says, if there is one."""
    folder = Path(module.module_args.args["moments"])
    moment = folder / f"{module.name}.{stage}"
    claimed = folder / f"done.{module.name}.{stage}.{os.getpid()}"
    try:
        moment.rename(claimed)
    except FileNotFoundError:
        return
    kind = claimed.read_text(encoding="utf-8")
    own = os.getpid()
    if kind == "kill":
        os.kill(own, signal.SIGKILL)
    elif kind == "exit":
        os._exit(1)
    elif kind == "stop":
        os.kill(own, signal.SIGSTOP)
    elif kind == "pause":
        wake = f"sleep {PAUSE_S}; kill -CONT {own}"
        subprocess.Popen(["sh", "-c", wake], start_new_session=True)
        os.kill(own, signal.SIGSTOP)
    elif kind == "driver":
        os.kill(int((folder / "driver.pid").read_text(encoding="utf-8")), signal.SIGKILL)


class SoakPolicy(PolicyInference):
    """Suffers while it generates, takes weights, or is evaluated."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Generation."""
        suffer(self, "generation")
        return super().forward_step(data)

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Evaluation."""
        suffer(self, "evaluation")
        return super().eval_step(data)

    def after_weight_sync(self, version: int) -> None:
        """The end of a sync."""
        super().after_weight_sync(version)
        suffer(self, "sync")


class SoakReference(PolicyReference):
    """Suffers while it scores."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Scoring."""
        suffer(self, "scoring")
        return super().forward_step(data)


class SoakValue(ValueInference):
    """Suffers while it scores."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Scoring."""
        suffer(self, "scoring")
        return super().forward_step(data)


class SoakReward(BaseModule):
    """Likes responses of even tokens; suffers while it scores or evaluates."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Scoring."""
        suffer(self, "scoring")
        return self._score(data)

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Evaluation."""
        suffer(self, "evaluation")
        return self._score(data)

    def _score(self, data: dict[str, Any]) -> dict[str, Any]:
        rewards = [
            sum(1.0 for token in ids if int(token) % 2 == 0) / max(1, len(ids))
            for ids in data["response_token_ids"]
        ]
        return {**data, "rewards": torch.tensor(rewards)}


def note_batch(module: BaseModule, data: list[dict[str, Any]]) -> None:
    """Write down what an update is made on, so that two runs can be compared."""
    digest = hashlib.sha256()
    for ids, part in zip(module.row_ids, data, strict=True):
        digest.update(repr([tuple(row_id) for row_id in ids]).encode())
        for name in ("prompt_token_ids", "response_token_ids", "rewards", "rollout_logprobs"):
            for value in part.get(name, ()):
                digest.update(torch.as_tensor(value).double().numpy().tobytes())
    note = {
        "at": [module.name, module.iteration, module.rank],
        "rows": sum(len(ids) for ids in module.row_ids),
        "digest": digest.hexdigest(),
    }
    path = module.run_dir / f"trained-{module.name}-{module.rank}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(note) + "\n")


class SoakPolicyTrainer(PolicyTrainer):
    """Suffers while it trains, gives weights, or saves."""

    def train_step(self, data: list[dict[str, Any]]) -> dict[str, float]:
        """Training."""
        suffer(self, "training")
        note_batch(self, data)
        return super().train_step(data)

    def before_weight_sync(self) -> None:
        """The beginning of a sync."""
        super().before_weight_sync()
        suffer(self, "sync")

    def save_checkpoint(self, iteration: int) -> None:
        """Saving."""
        super().save_checkpoint(iteration)
        suffer(self, "saving")


class SoakValueTrainer(ValueTrainer):
    """Suffers while it trains, gives weights, or saves."""

    def train_step(self, data: list[dict[str, Any]]) -> dict[str, float]:
        """Training."""
        suffer(self, "training")
        note_batch(self, data)
        return super().train_step(data)

    def save_checkpoint(self, iteration: int) -> None:
        """Saving."""
        super().save_checkpoint(iteration)
        suffer(self, "saving")
