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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chatlearn.checkpoint.folders import find_newest
from chatlearn.checkpoint.run_state import read_run_state
from scripts.faults.checkpoints import find_bad_checkpoints
from scripts.faults.workload import read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SaveKills", "kill_while_saving"]

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 120.0
_POLL_S = 0.005
_LONGEST_SAVE_S = 1.5
_RESUMED = re.compile(r"resuming (\S+) after episode \d+")


@dataclass(frozen=True)
class SaveKills:
    """What became of a run that was killed while it saved.

    Attributes:
        kills: how often; each once there was a whole checkpoint.
        resumed: starts after a kill that said they went on from the newest whole checkpoint.
        while_writing: kills that left a draft.
        ended: the last start ran to its end.
        same_metrics: as those of the undisturbed run.
        left: checkpoints of the last start that do not load.
        last_episode: of the last start.
    """

    kills: int
    resumed: int
    while_writing: int
    ended: bool
    same_metrics: bool
    left: list[str]
    last_episode: int

    @property
    def is_good(self) -> bool:
        """Whether each kill was followed by a resume, and the run came to what it should."""
        is_same = self.ended and self.same_metrics
        return self.resumed == self.kills and is_same and not self.left

    def to_json(self) -> dict[str, Any]:
        """The one JSON object that tells of it."""
        return asdict(self)


def kill_while_saving(count: int, seed: int, tell: Callable[[str], None]) -> SaveKills:
    """Start, kill while saving, start again from what is there, `count` times; then let it end."""
    lots = random.Random(seed)
    base = Path(tempfile.mkdtemp(prefix="chatlearn-save-kills-"))
    try:
        return _kill_all(base, count, lots, tell)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def _kill_all(
    base: Path, count: int, lots: random.Random, tell: Callable[[str], None]
) -> SaveKills:
    config = _write_config(base, num_episodes=100 * count)
    resumed = while_writing = 0
    known: Path | None = None
    for number in range(count):
        log = base / f"start-{number}.log"
        process = _start(config, log, f"runtime.async_save={str(number % 2 == 0).lower()}")
        # The draft of a second checkpoint shows that the first one is whole.
        is_begun = _await_draft(base, process, max(1, _episode_of(known)))
        time.sleep(lots.uniform(0.0, _LONGEST_SAVE_S))
        process.kill()
        process.wait(_LIMIT_S)
        if not is_begun:
            tell(f"kill {number + 1}: nothing was being saved: {_read(log)}")
            break
        if known is not None:
            resumed += _went_on_from(known, log, tell)
        drafts = list(base.glob("runs/kills/*/checkpoints/.*.partial"))
        while_writing += bool(drafts)
        for draft in drafts:
            shutil.rmtree(draft)
        known = _newest(base)
        if (number + 1) % 10 == 0:
            tell(f"{number + 1} kills, {resumed} resumed, {while_writing} left a draft")
    log = base / "last.log"
    last_episode = _episode_of(known) + 1
    code = _start(config, log, f"runtime.num_episode={last_episode}").wait(_LIMIT_S)
    resumed += known is not None and _went_on_from(known, log, tell)
    tell(f"the undisturbed run: {last_episode} episodes")
    return SaveKills(
        kills=count,
        resumed=resumed,
        while_writing=while_writing,
        ended=code == 0 and _episode_of(_newest(base)) == last_episode,
        same_metrics=read_metrics(base, "kills") == _run_undisturbed(base, config, last_episode),
        left=find_bad_checkpoints(sorted(base.glob("runs/kills/*"))[-1:]),
        last_episode=_episode_of(_newest(base)),
    )


def _run_undisturbed(base: Path, config: Path, num_episodes: int) -> list[dict[str, float]]:
    """The metrics of as many episodes at one go."""
    log = base / "undisturbed.log"
    overrides = ("runtime.exp_name=undisturbed", f"runtime.num_episode={num_episodes}")
    code = _start(config, log, *overrides).wait(_LIMIT_S + 10.0 * num_episodes)
    if code != 0:
        raise RuntimeError(f"the undisturbed run ended with {code}: {_read(log)}")
    return read_metrics(base, "undisturbed")


def _went_on_from(checkpoint: Path, log: Path, tell: Callable[[str], None]) -> bool:
    """Whether a start said that it resumed this checkpoint."""
    said = _RESUMED.search(_read(log))
    is_right = said is not None and Path(said[1]) == checkpoint.resolve()
    if not is_right:
        tell(f"there was {checkpoint}, but the next start said: {_read(log)}")
    return is_right


def _read(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


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


def _start(config: Path, log: Path, *overrides: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "chatlearn.cli.main", "train", str(config)]
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


def _newest(base: Path) -> Path | None:
    return find_newest(sorted(base.glob("runs/kills/*/checkpoints"))).checkpoint


def _episode_of(checkpoint: Path | None) -> int:
    return 0 if checkpoint is None else read_run_state(checkpoint).episode
