"""Megatron modules of a tiny PPO run that suffer a fault when they are told to.

A fault is a file `<model>.<stage>` in the folder `models.<name>.args.moments`, with the kind of
fault as its content. The first rank that comes to that stage takes the file away and suffers.
`<model>.writing` waits for a thread that writes a checkpoint, and strikes when its file is there in
part. `node.<stage>` is for any worker of the node whose mark is in the file `node.mark`: it stands
still, and the bench takes its node away.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import threading
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
from scripts.faults.traces import MARK

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

__all__ = [
    "SoakPolicy",
    "SoakPolicyTrainer",
    "SoakReference",
    "SoakReward",
    "SoakValue",
    "SoakValueTrainer",
]

PAUSE_S = 2
# Long enough for the bench to take the node away, shorter than a hang.
_HOLD_S = 5
_POLL_S = 0.0002


def suffer(module: BaseModule, stage: str) -> None:
    """Do what the file for this model and stage says, if there is one."""
    kind = _claim(module, stage)
    if kind:
        _strike(kind, _moments(module))


def while_writing(
    module: BaseModule, job: Callable[[], Iterable[Path] | None]
) -> Callable[[], Iterable[Path] | None]:
    """A job of `write_files` that suffers once this rank's file is there in part."""
    files = module.checkpoint_dir, f"__{module.rank}_*.distcp"

    def write() -> Iterable[Path] | None:
        kind = _claim(module, "writing")
        if not kind:
            return job()
        is_over = threading.Event()

        def watch() -> None:
            while not any(path.stat().st_size for path in files[0].glob(files[1])):
                if is_over.wait(_POLL_S):
                    break
            _strike(kind, _moments(module))

        watcher = threading.Thread(target=watch, name="fault", daemon=True)
        watcher.start()
        try:
            return job()
        finally:
            is_over.set()
            watcher.join()

    return write


def _moments(module: BaseModule) -> Path:
    return Path(module.module_args.args["moments"])


def _claim(module: BaseModule, stage: str) -> str:
    """Take the file for this stage away; gives the kind of fault, or nothing."""
    folder = _moments(module)
    names = (module.name, "node") if _is_on_doomed_node(folder) else (module.name,)
    for name in names:
        claimed = folder / f"done.{name}.{stage}.{module.name}.{os.getpid()}"
        try:
            (folder / f"{name}.{stage}").rename(claimed)
        except FileNotFoundError:
            continue
        return claimed.read_text(encoding="utf-8")
    return ""


def _is_on_doomed_node(folder: Path) -> bool:
    try:
        return (folder / "node.mark").read_text(encoding="utf-8") == os.environ.get(MARK)
    except FileNotFoundError:
        return False


def _strike(kind: str, folder: Path) -> None:
    own = os.getpid()
    if kind == "kill":
        os.kill(own, signal.SIGKILL)
    elif kind == "exit":
        os._exit(1)
    elif kind == "stop":
        os.kill(own, signal.SIGSTOP)
    elif kind in ("pause", "node"):
        wake = f"sleep {PAUSE_S if kind == 'pause' else _HOLD_S}; kill -CONT {own}"
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

    def write_files(self, job: Callable[[], Iterable[Path] | None]) -> None:
        """Writing, which suffers in the midst of it."""
        super().write_files(while_writing(self, job))


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

    def write_files(self, job: Callable[[], Iterable[Path] | None]) -> None:
        """Writing, which suffers in the midst of it."""
        super().write_files(while_writing(self, job))
