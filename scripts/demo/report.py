# pyright: standard, reportPrivateImportUsage=false
"""What the demo leaves behind: a picture, a summary, and a few lines on the terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from chatlearn import RunResult
    from scripts.demo.problems import Problem

__all__ = ["draw_curve", "find_warm_start_faults", "write_report"]

_SAMPLES = 6
# What the warm start is meant to end at; with less, some seeds end below 90 %.
_EXACT_MATCH = (0.45, 0.65)
_RIGHT_OR_CARRY_FREE = 0.95


def write_report(
    result: RunResult, held_out: Sequence[Problem], options: argparse.Namespace, started_s: float
) -> dict[str, Any]:
    """Draw the curve, print before and after, write `summary.json` last; gives the summary.

    Args:
        result: of the reinforcement learning, evaluated before it began.
        held_out: the problems of the evaluation.
        options: of the command line.
        started_s: when the process began, seconds since the epoch.
    """
    evaluations = [entry for entry in result.metrics if "eval/exact_match" in entry]
    first, last = evaluations[0], evaluations[-1]
    picture = draw_curve(result.run_dir / "learning_curve.png", result.metrics, options)
    summary = {
        "algo": options.algo,
        "reward": options.reward,
        "seed": options.seed,
        "warm_start_exact_match": first["eval/exact_match"],
        "warm_start_right_or_carry_free": first["eval/right_or_carry_free"],
        "exact_match_before": first["eval/exact_match"],
        "exact_match_after": last["eval/exact_match"],
        "exact_match_by_episode": {
            int(entry["step"]): entry["eval/exact_match"] for entry in evaluations
        },
        "reward_by_episode": {
            int(entry["step"]): entry["eval/reward"]
            for entry in evaluations
            if "eval/reward" in entry
        },
        "num_held_out": len(held_out),
    }
    _print_summary(summary, result)
    summary["wall_s"] = round(time.time() - started_s, 1)
    path = result.run_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_end(summary, result.run_dir, picture)
    return summary


def find_warm_start_faults(exact_match: float, right_or_carry_free: float) -> list[str]:
    """Why reinforcement learning may not reach its aim from this warm start; a line each.

    Args:
        exact_match: share of held-out problems that were solved before it.
        right_or_carry_free: share answered right or without the carries: it learns to choose
            between these two, and hardly anything else.
    """
    faults: list[str] = []
    low, high = _EXACT_MATCH
    if not low <= exact_match <= high:
        faults.append(f"exact match is {exact_match:.1%}, expected {low:.0%} to {high:.0%}")
    if right_or_carry_free < _RIGHT_OR_CARRY_FREE:
        faults.append(
            f"{right_or_carry_free:.1%} of the answers are right or carry-free, expected "
            f"{_RIGHT_OR_CARRY_FREE:.0%} or more"
        )
    return faults


def draw_curve(
    path: Path, metrics: Sequence[Mapping[str, float]], options: argparse.Namespace
) -> Path:
    """Reward of the rollouts and exact match on held-out problems, by episode, as a PNG.

    A reward model's score stands beside the truth; a verifier's is the truth.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    lines = {
        "rollout/reward": ("reward of the samples", "C7", "."),
        "eval/exact_match": ("held-out exact match, sampled", "C0", "o"),
    }
    if options.reward == "model":
        lines["eval/reward"] = ("reward model's score, held-out", "C1", "s")
    for name, (label, color, marker) in lines.items():
        points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    axes.axhline(0.9, color="C2", linewidth=1, linestyle="--", label="90 %")
    axes.set(
        xlabel="episode", ylabel="share", title=f"Addition, {options.algo.upper()}", ylim=(0, 1.02)
    )
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _format_table(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> list[str]:
    """Each evaluation; with a reward model, its score beside the truth."""
    has_model = summary["reward"] == "model"
    lines = ["  episode  exact match" + ("  reward model's score" if has_model else "")]
    for entry in metrics:
        if "eval/exact_match" in entry:
            line = f"  {entry['step']:7.0f}  {entry['eval/exact_match']:11.1%}"
            lines.append(line + (f"  {entry['eval/reward']:20.3f}" if has_model else ""))
    return lines


def _print_summary(summary: Mapping[str, Any], result: RunResult) -> None:
    rows = next(iter(result.evaluation.values()))
    exact_match = summary["warm_start_exact_match"]
    share = summary["warm_start_right_or_carry_free"]
    lines = [
        "",
        f"Warm start: {exact_match:.1%} right, {share:.1%} right or carry-free.",
        *(
            f"WARNING: the warm start: {line}"
            for line in find_warm_start_faults(exact_match, share)
        ),
        f"Held-out exact match, sampled at temperature 1, {summary['num_held_out']} problems:",
        f"  before {summary['exact_match_before']:.1%}   after {summary['exact_match_after']:.1%}",
        "",
        *_format_table(summary, result.metrics),
        "",
        "A few answers after training:",
    ]
    for row in rows[:_SAMPLES]:
        mark = "right" if row["response"] == row["answer"] else f"wrong, {row['answer']}"
        lines.append(f"  {row['prompt']}{row['response']}  ({mark})")
    sys.stdout.write("\n".join(lines) + "\n")


def _print_end(summary: Mapping[str, Any], run_dir: Path, picture: Path) -> None:
    sys.stdout.write(
        f"\n{summary['wall_s']:.0f} seconds. Run folder: {run_dir}\n"
        f"  learning curve: {picture.name}   numbers: summary.json, metrics.jsonl   "
        "TensorBoard: tensorboard/\n"
    )
