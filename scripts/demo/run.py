"""Warm start, reinforcement learning and report of the addition demo: `make demo`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

import chatlearn
from chatlearn.checkpoint.folders import find_checkpoints
from chatlearn.cli.main import run_to_exit_code
from chatlearn.engine.from_config import build_engine
from scripts.demo.problems import (
    Problem,
    build_tokenizer,
    split_problems,
    warm_start_rows,
    write_rows,
)
from scripts.demo.report import write_report
from scripts.demo.reward_model import build_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn import RunResult

__all__ = ["main", "name_checkpoint"]

_ROOT = Path(__file__).resolve().parents[2]
# Steps of 128 rows, and the share of their answers that forget the carries.
_CURRICULUM = ((500, 0.40), (60, 0.65))
_ROWS_PER_STEP = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; gives the exit code, as the command line does."""
    options = _parse(arguments)
    return run_to_exit_code(lambda: _run_demo(options))


def _run_demo(options: argparse.Namespace) -> None:
    started_s = psutil.Process().create_time()
    folder = Path(options.output).resolve()
    training, held_out = _prepare_data(folder, options.seed)
    _say("warm start: supervised training on right and on carry-free answers")
    name_checkpoint(folder, _run_config("demo_warm_start", options.seed).run_dir, "warm_start")
    name = f"demo_{options.algo}"
    if options.reward == "model":
        _say("reward model: trained on pairs of answers")
        _train_reward_model(folder, training, options.seed)
        name += "_reward_model"
    _say(f"{options.algo.upper()} with {_describe_reward(options.reward)}")
    result = _run_config(name, options.seed, options.overrides)
    write_report(result, held_out, options, started_s)


def name_checkpoint(folder: Path, run_dir: Path, model_name: str) -> Path:
    """Let `folder/model_name` lead to the model's newest checkpoint of a run.

    The configs of the later steps name it, so that they also run by themselves afterwards.
    """
    newest = find_checkpoints(run_dir / "checkpoints")[-1] / "models" / model_name
    link, draft = folder / model_name, folder / f".{model_name}.new"
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(newest, folder))
    draft.replace(link)
    return link


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--algo", choices=("ppo", "grpo"), default="ppo")
    parser.add_argument("--reward", choices=("rule", "model"), default="rule")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/demo", help="folder of data and runs")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the last step")
    return parser.parse_args(arguments)


def _prepare_data(folder: Path, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Write tokenizer and data files; gives training and held-out problems."""
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    os.environ["DEMO_DIR"] = str(folder)
    training, held_out = split_problems(seed)
    build_tokenizer(data / "addition", training)
    rows = [
        row
        for steps, share in _CURRICULUM
        for row in warm_start_rows(training, steps * _ROWS_PER_STEP, share, seed)
    ]
    write_rows(data / "warm_start.jsonl", rows)
    write_rows(data / "train.jsonl", [problem.as_row() for problem in training])
    write_rows(data / "held_out.jsonl", [problem.as_row() for problem in held_out])
    return training, held_out


def _train_reward_model(folder: Path, problems: Sequence[Problem], seed: int) -> None:
    """Let the policy answer, make pairs of its mistakes, train on them."""
    samples = _run_config("demo_sampling", seed).rollouts
    write_rows(folder / "data" / "pairs.jsonl", build_pairs(problems, samples, seed))
    name_checkpoint(folder, _run_config("demo_reward", seed).run_dir, "reward_trainer")


def _run_config(name: str, seed: int, overrides: Sequence[str] = ()) -> RunResult:
    """What `chatlearn train configs/NAME.yaml` does, with the demo's seed."""
    path = _ROOT / "configs" / f"{name}.yaml"
    config = chatlearn.init(path, [f"runtime.seed={seed}", *overrides])
    return build_engine(config).learn()


def _describe_reward(kind: str) -> str:
    return "the rule-based verifier" if kind == "rule" else "a reward model"


def _say(text: str) -> None:
    sys.stderr.write(f"\n{text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    sys.exit(main())
