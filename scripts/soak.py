"""Lets faults happen to a tiny PPO run, at every stage, and shows that nothing is lost by them.

Workers are killed, stopped and paused, the driver is killed, and nodes are lost, on a seeded
schedule. Afterwards every update has been made on the same samples, with the same metrics, as in
the undisturbed run; no process and no shared memory is left; every checkpoint verifies.

    python -m scripts.soak --faults 60 --json
    python -m scripts.soak --short
    python -m scripts.soak --save-kills 50
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    # Started as a file: what is beside it must not hide installed packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.faults.campaign import Campaign, Fault, Outcome, describe, run_undisturbed
from scripts.faults.traces import shared_memory
from scripts.faults.workload import FAULTS, write_workload

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "plan_faults"]

_PER_RUN = 12
_LIMIT_S = 150.0


# Every stage once, within the minutes that a check may take.
SHORT = (
    Fault("kill", "policy", "generation"),
    Fault("driver", "reference", "scoring"),
    Fault("exit", "value", "scoring"),
    Fault("stop", "reward", "scoring"),
    Fault("kill", "policy_trainer", "training"),
    Fault("pause", "policy_trainer", "training"),
    Fault("kill", "policy", "evaluation"),
    Fault("pause", "value_trainer", "saving"),
    Fault("kill", "policy", "sync"),
    Fault("kill", "reward", "evaluation"),
    Fault("exit", "value_trainer", "saving"),
    Fault("kill", "reference", "scoring"),
)


def plan_faults(count: int, seed: int) -> list[list[Fault]]:
    """A schedule: every stage of every model in turn, kinds by lot, cut to runs.

    Args:
        count: faults in all.
        seed: of the lots.
    """
    lots = random.Random(seed)
    places = [(model, stage) for model, stages in FAULTS.items() for stage in stages]
    faults: list[Fault] = []
    while len(faults) < count:
        lots.shuffle(places)
        for model, stage in places:
            kind = lots.choices(["kill", "exit", "stop", "pause", "driver"], [5, 2, 2, 1, 1])[0]
            faults.append(Fault(kind, model, stage))
    faults = faults[:count]
    return [faults[at : at + _PER_RUN] for at in range(0, count, _PER_RUN)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; the exit code is 0 where every fault was survived."""
    parsed = _parse(arguments)
    if parsed.save_kills:
        from scripts.faults.save_kills import kill_while_saving

        result = kill_while_saving(parsed.save_kills, parsed.seed, _tell)
        sys.stdout.write(json.dumps(result) + "\n")
        return 0 if result["resumed"] == result["kills"] else 1
    base = Path(tempfile.mkdtemp(prefix="chatlearn-soak-"))
    try:
        result = _soak(parsed, base)
    finally:
        if not parsed.keep:
            shutil.rmtree(base, ignore_errors=True)
    if not parsed.json:
        _print_table(result["rows"])
    sys.stdout.write(json.dumps(result) + "\n")
    is_good = result["survived"] == result["faults"] and result["same_training_samples"]
    return 0 if is_good and not result["left"] else 1


def _soak(parsed: argparse.Namespace, base: Path) -> dict[str, Any]:
    schedule = [list(SHORT)] if parsed.short else plan_faults(parsed.faults, parsed.seed)
    num_episodes = 2 * max(map(len, schedule)) + 6
    memory = shared_memory()
    is_wide = not parsed.short
    _tell(f"the undisturbed run: {num_episodes} episodes")
    reference = base / "undisturbed"
    config = write_workload(reference, num_episodes, is_wide=is_wide)
    expected = run_undisturbed(reference, config, uuid.uuid4().hex, 600.0)
    rows: list[Outcome] = []
    left: list[str] = []
    are_samples_same = are_metrics_same = True
    for number, faults in enumerate(schedule):
        folder = base / f"run-{number}"
        config = write_workload(folder, num_episodes, is_wide=is_wide)
        campaign = Campaign(folder, config, uuid.uuid4().hex, limit_s=_LIMIT_S)
        start_s = time.monotonic()
        outcomes = campaign.run(faults)
        left += campaign.find_leftovers()
        rows += outcomes
        found = campaign.account()
        are_samples_same &= found["trained"] == expected["trained"]
        are_metrics_same &= found["metrics"] == expected["metrics"]
        survived = sum(outcome.survived for outcome in outcomes)
        _tell(
            f"run {number + 1} of {len(schedule)}: {survived} of {len(outcomes)} survived, samples "
            f"{'the same' if found == expected else 'DIFFER'}, {time.monotonic() - start_s:.0f} s"
        )
    if parsed.nodes:
        from scripts.faults.nodes import lose_nodes

        outcomes, found_left = lose_nodes(base, parsed.nodes, _LIMIT_S, _tell)
        rows += outcomes
        left += found_left
    left += sorted(shared_memory() - memory)
    return {
        "faults": len(rows),
        "survived": sum(row.survived for row in rows),
        "same_training_samples": are_samples_same,
        "same_metrics": are_metrics_same,
        "left": left,
        "rows": describe(rows),
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Faults for a tiny PPO run.")
    parser.add_argument("--faults", type=int, default=12, help="how many, besides lost nodes")
    parser.add_argument("--nodes", type=int, default=0, help="how often a node is lost or cut off")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule")
    parser.add_argument(
        "--short",
        action="store_true",
        help=f"the {len(SHORT)} faults of `make test-faults`, with one rank for each model",
    )
    parser.add_argument("--save-kills", type=int, default=0, help="kill -9 so often while saving")
    parser.add_argument("--json", action="store_true", help="no table, only the line of JSON")
    parser.add_argument("--keep", action="store_true", help="keep the run folders")
    return parser.parse_args(arguments)


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    sys.stdout.write("| fault | model | stage | outcome | seconds |\n|---|---|---|---|---|\n")
    for row in rows:
        sys.stdout.write(
            f"| {row['fault']} | {row['model']} | {row['stage']} | {row['outcome']} | "
            f"{row['recovery_s']:.1f} |\n"
        )


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
