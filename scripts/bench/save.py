"""How long a checkpoint stalls the training loop: written beside the run's work, and at once.

One Megatron trainer in Ray, 42 million parameters in fp32 with Adam's moments: 0.5 GB on disk.
Runs of both kinds alternate; the first save of each run, which touches fresh memory, counts apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

ROOT = Path(__file__).resolve().parents[2]
_BAR = 0.1
_LIMIT_S = 900.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print a line for each kind and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind")
    parser.add_argument("--episodes", type=int, default=5, help="saves of each run")
    parser.add_argument("--backend", choices=("ray", "local"), default="ray")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parsed = parser.parse_args(arguments)
    found: dict[bool, list[list[float]]] = {True: [], False: []}
    num_bytes = 0
    with tempfile.TemporaryDirectory(prefix="chatlearn-save-") as name:
        for number in range(2 * parsed.rounds):
            is_async = number % 2 == 0
            folder = Path(name) / str(number)
            found[is_async].append(_run(folder, parsed.episodes, parsed.backend, is_async=is_async))
            num_bytes = _size(folder)
            subprocess.run(["rm", "-rf", str(folder)], check=True, timeout=60)
    later = {
        kind: statistics.median(s for run in runs for s in run[1:]) for kind, runs in found.items()
    }
    first = {kind: statistics.median(run[0] for run in runs) for kind, runs in found.items()}
    share = later[True] / later[False]
    if not parsed.json:
        for kind, label in ((False, "at once"), (True, "beside")):
            sys.stdout.write(
                f"{label:8} first {first[kind]:.3f} s, later {later[kind]:.3f} s (median)\n"
            )
    measure = {"ours": later[True], "peer": later[False], "ratio": _BAR / share, "bar": 1.0}
    result = {
        "measures": {"save_stall": measure},
        "checkpoint_bytes": num_bytes,
        "first_save_s": {"beside": first[True], "at_once": first[False]},
        "backend": parsed.backend,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _run(folder: Path, num_episodes: int, backend: str, *, is_async: bool) -> list[float]:
    """Seconds of each save."""
    folder.mkdir(parents=True)
    rows = [{"prompt_token_ids": [3 + i % 20, 4], "response_token_ids": [5, 2]} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trainer = {
        "module": "megatron_adapters:PolicyTrainer",
        "bf16": False,
        "num_layers": 8,
        "hidden_size": 640,
        "ffn_hidden_size": 1792,
        "num_attention_heads": 10,
        "vocab_size": 1024,
        "max_sequence_length": 64,
        "lr": 1e-5,
    }
    runtime = {
        "engine": "scripts.faults.save_kills:build_engine",
        "backend": backend,
        "algorithm": {"loss": "sft"},
        "num_episode": 2 * num_episodes,
        "train_micro_batch_size": 8,
        # Two episodes of a second or two each: as long as the writing takes.
        "save_episode_interval": 2,
        "save_total_limit": 1,
        "async_save": is_async,
        "data_path": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "runs"),
        "exp_name": "save",
        "enable_tensorboard": False,
    }
    content = {"models": {"policy_trainer": trainer}, "runtime": runtime}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    subprocess.run(
        [sys.executable, "-m", "chatlearn.cli.main", "train", str(path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=_LIMIT_S,
        capture_output=True,
    )
    (metrics,) = folder.glob("runs/save/*/metrics.jsonl")
    lines: list[dict[str, Any]] = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["time/save"] for line in lines if "time/save" in line]


def _size(folder: Path) -> int:
    (checkpoint,) = folder.glob("runs/save/*/checkpoints/episode_*")
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
