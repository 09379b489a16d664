"""What the demo leaves behind: a picture, a summary, and a few lines on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from chatlearn import RunResult
    from scripts.demo.problems import Problem

__all__ = ["draw_curve", "write_report"]

_SAMPLES = 6


def write_report(
    result: RunResult, held_out: Sequence[Problem], options: argparse.Namespace, wall_s: float
) -> dict[str, Any]:
    """Draw the curve, write `summary.json`, print before and after; gives the summary."""
    curve = [
        (int(entry["step"]), float(entry["eval/exact_match"]))
        for entry in result.metrics
        if "eval/exact_match" in entry
    ]
    picture = draw_curve(result.run_dir / "learning_curve.png", result.metrics, options.algo)
    summary = {
        "algo": options.algo,
        "reward": options.reward,
        "seed": options.seed,
        "exact_match_before": curve[0][1],
        "exact_match_after": curve[-1][1],
        "exact_match_by_episode": dict(curve),
        "reward_by_episode": {
            int(entry["step"]): entry["eval/reward"]
            for entry in result.metrics
            if "eval/reward" in entry
        },
        "num_held_out": len(held_out),
        "wall_s": round(wall_s, 1),
    }
    path = result.run_dir / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    _print_summary(summary, result, picture)
    return summary


def draw_curve(path: Path, metrics: Sequence[Mapping[str, float]], algo: str) -> Path:
    """Reward of the rollouts and exact match on held-out problems, by episode, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    lines = {
        "rollout/reward": ("reward of the samples", "C7", "."),
        "eval/exact_match": ("held-out exact match, sampled", "C0", "o"),
        "eval/reward": ("reward model's score, held-out", "C1", "s"),
    }
    for name, (label, color, marker) in lines.items():
        points = [(entry["step"], entry[name]) for entry in metrics if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    axes.axhline(0.9, color="C2", linewidth=1, linestyle="--", label="90 %")
    axes.set(xlabel="episode", ylabel="share", title=f"Addition, {algo.upper()}", ylim=(0, 1.02))
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


def _print_summary(summary: Mapping[str, Any], result: RunResult, picture: Path) -> None:
    rows = next(iter(result.evaluation.values()))
    lines = [
        "",
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
    lines += [
        "",
        f"{summary['wall_s']:.0f} seconds. Run folder: {result.run_dir}",
        f"  learning curve: {picture.name}   numbers: summary.json, metrics.jsonl   "
        "TensorBoard: tensorboard/",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
