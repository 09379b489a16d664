"""kill -9 at random moments while a checkpoint is being written; the run goes on each time.

One trainer in the `local` backend, so that the process that is killed is driver and writer in one.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chatlearn.checkpoint.folders import find_newest
from chatlearn.checkpoint.run_state import read_run_state

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["kill_while_saving"]

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 120.0
_POLL_S = 0.005
_LONGEST_SAVE_S = 1.5
_RESUMED = re.compile(r"resuming \S+ after episode (\d+)")


def kill_while_saving(count: int, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Start, kill while saving, start again from what is there, `count` times; then let it end.

    Returns:
        `kills`, `resumed` (starts that went on from the newest checkpoint that was whole),
        `while_writing` (kills that left a draft or nothing of the checkpoint that was begun),
        `ended`: whether the last start ran to its end.
    """
    lots = random.Random(seed)
    base = Path(tempfile.mkdtemp(prefix="chatlearn-save-kills-"))
    try:
        return _kill_all(base, count, lots, tell)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _kill_all(
    base: Path, count: int, lots: random.Random, tell: Callable[[str], None]
) -> dict[str, Any]:
    config = _write_config(base, num_episodes=100 * count)
    resumed = while_writing = 0
    for number in range(count):
        known = _newest_episode(base)
        log = base / f"start-{number}.log"
        process = _start(config, log, is_async=number % 2 == 0)
        is_begun = _await_draft(base, process, known)
        time.sleep(lots.uniform(0.0, _LONGEST_SAVE_S))
        process.kill()
        process.wait(_LIMIT_S)
        said = _RESUMED.search(log.read_text(encoding="utf-8", errors="replace"))
        went_on = int(said[1]) if said else 0
        is_right = is_begun and went_on == known
        resumed += is_right
        drafts = list(base.glob("runs/kills/*/checkpoints/.*.partial"))
        while_writing += bool(drafts)
        for draft in drafts:
            shutil.rmtree(draft)
        if not is_right:
            tell(f"kill {number + 1}: went on from {went_on}, there was {known}: {log.read_text()}")
        elif (number + 1) % 10 == 0:
            tell(f"{number + 1} kills, {resumed} resumed, {while_writing} left a draft")
    known = _newest_episode(base)
    log = base / "last.log"
    process = _start(config, log, is_async=True, more=f"runtime.num_episode={known + 1}")
    code = process.wait(_LIMIT_S)
    return {
        "kills": count,
        "resumed": resumed,
        "while_writing": while_writing,
        "ended": code == 0,
        "last_episode": _newest_episode(base),
    }


def _write_config(base: Path, num_episodes: int) -> Path:
    rows = [{"prompt_token_ids": [3 + i % 20, 4], "response_token_ids": [5, 2]} for i in range(8)]
    data = base / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    trainer = {
        "module": "megatron_adapters:PolicyTrainer",
        "bf16": False,
        "num_layers": 2,
        "hidden_size": 512,
        "ffn_hidden_size": 1024,
        "num_attention_heads": 8,
        "vocab_size": 1024,
        "max_sequence_length": 16,
        "lr": 1e-4,
    }
    content = {
        "models": {"policy_trainer": trainer},
        "runtime": {
            "engine": "scripts.faults.save_kills:build_engine",
            "backend": "local",
            "algorithm": {"loss": "sft"},
            "num_episode": num_episodes,
            "train_micro_batch_size": 8,
            "save_episode_interval": 1,
            "save_total_limit": 2,
            "deterministic": True,
            "data_path": str(data),
            "output_dir": str(base / "runs"),
            "exp_name": "kills",
            "enable_tensorboard": False,
            "resume": "auto",
        },
    }
    path = base / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def build_engine(config: Any) -> Any:
    """A trainer alone, on the rows of the data set."""
    from chatlearn import Engine, Trainer
    from chatlearn.engine.from_config import build_module

    trainer = build_module(config, "policy_trainer")
    return Engine(None, Trainer(lambda batch: trainer.train_step(batch)))


def _start(config: Path, log: Path, *, is_async: bool, more: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chatlearn.cli.main", "train", str(config)]
    overrides = [f"runtime.async_save={str(is_async).lower()}", *([more] if more else [])]
    with log.open("wb") as output:
        return subprocess.Popen(
            [*command, *overrides],
            cwd=config.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _await_draft(base: Path, process: subprocess.Popen[bytes], known: int) -> bool:
    """Until the process writes a checkpoint beyond the one that it began from."""
    deadline = time.monotonic() + _LIMIT_S
    while time.monotonic() < deadline and process.poll() is None:
        for draft in base.glob("runs/kills/*/checkpoints/.episode_*.partial"):
            if int(draft.name.split("_")[1].split(".")[0]) > known:
                return True
        time.sleep(_POLL_S)
    return False


def _newest_episode(base: Path) -> int:
    found = find_newest(sorted(base.glob("runs/kills/*/checkpoints"))).checkpoint
    return read_run_state(found).episode if found is not None else 0
