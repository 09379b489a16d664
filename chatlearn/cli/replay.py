"""`chatlearn replay`: run a dumped step again and say what came of it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chatlearn.cli.tables import print_table

if TYPE_CHECKING:
    import argparse

    from chatlearn.engine.replayed import Replay

__all__ = ["run_replay"]

_CLOSE = 1e-3


def run_replay(parsed: argparse.Namespace) -> None:
    """Run the step of the dump that was named, and print the outcome."""
    from chatlearn.engine.replay import replay_step

    print_replay(replay_step(Path(parsed.dump), parsed.overrides))


def print_replay(replay: Replay) -> None:
    """Print what was wrong then, and the numbers now."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    console.print(f"then: {replay.subject}: {replay.fault}", markup=False, highlight=False)
    if not replay.is_exact:
        console.print(
            "the model was saved after the update, so the step does not begin where it did",
            markup=False,
        )
    if replay.metrics:
        rows = [
            (name, f"{replay.value:.6g}" if name == replay.name else "", f"{value:.6g}")
            for name, value in replay.metrics.items()
        ]
        print_table(console, "the step", ("number", "then", "now"), rows)
    text = f"now: {replay.error}" if replay.error else "now: the step has run"
    console.print(text, markup=False, highlight=False)
    for warning in replay.warnings:
        console.print(f"now: {warning}", markup=False, highlight=False)
    again = "again" if came_again(replay) else "not again"
    console.print(f"the fault has come {again}", markup=False)


def came_again(replay: Replay) -> bool:
    """Whether the number that was wrong then is as wrong now."""
    if replay.is_again is not None:
        return replay.is_again
    if replay.error or replay.warnings:
        return True
    now = replay.metrics.get(replay.name)
    if now is None:
        return False
    if not math.isfinite(replay.value):
        return not math.isfinite(now)
    return math.isclose(now, replay.value, rel_tol=_CLOSE)
