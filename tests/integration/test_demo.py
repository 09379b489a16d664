"""The README's one-machine command, and the demo's configs once the demo has been there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.demo import run
from scripts.demo.problems import build_tokenizer, split_problems, warm_start_rows, write_rows

ROOT = Path(__file__).parents[2]
SMALL = [
    "runtime.num_episode=1",
    "runtime.sample_per_episode=32",
    "runtime.save_episode_interval=1",
]
SMALL += ["runtime.train_global_batch_size=32", "runtime.train_micro_batch_size=16"]


def run_local(folder, *arguments, **environment):
    """The script in a folder that has the checkout's files and no runs; gives its output."""
    for name in ("scripts", "configs"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        ["scripts/run_local.sh", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_runs_a_config_from_a_clean_folder(tmp_path):
    text = (ROOT / "README.md").read_text("utf-8")
    [config] = re.findall(r"^scripts/run_local\.sh (configs/\w+\.yaml)", text, re.MULTILINE)
    last = run_local(tmp_path, config).strip().splitlines()[-1]
    metrics = tmp_path / last.removeprefix("run folder: ") / "metrics.jsonl"
    lengths = [json.loads(line)["rollout/response_length"] for line in metrics.open()]
    assert lengths[-1] < 0.6 * lengths[0]


@pytest.mark.slow
@pytest.mark.long
def test_the_demos_config_runs_after_the_demo(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_DIR", str(tmp_path))
    (tmp_path / "data").mkdir()
    training, held_out = split_problems(0)
    build_tokenizer(tmp_path / "data" / "addition", training)
    files = {
        "warm_start": warm_start_rows(training, 32, 0.4, 0),
        "train": [problem.as_row() for problem in training[:32]],
        "held_out": [problem.as_row() for problem in held_out[:8]],
    }
    for name, rows in files.items():
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    first = run_local(tmp_path, "configs/demo_warm_start.yaml", *SMALL)
    run_dir = Path(first.strip().removeprefix("run folder: "))
    run.name_checkpoint(tmp_path, run_dir, "warm_start")
    assert "run folder: " in run_local(tmp_path, "configs/demo_ppo.yaml", *SMALL)
