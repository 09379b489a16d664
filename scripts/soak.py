"""Lets faults happen to a tiny PPO run, at every stage, and shows that nothing is lost by them.

Workers are killed, stopped and paused, the driver is killed, and nodes are lost, on a seeded
schedule. Afterwards every update has been made on the same samples, with the same metrics, as in
the undisturbed run; no process and no shared memory is left; every checkpoint verifies and loads.

    python -m scripts.soak --faults 62 --nodes 6 --json
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

from scripts.faults.campaign import Campaign, Fault, Report, run_undisturbed
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
    Fault("exit", "value_trainer", "saving", "writing"),
    Fault("kill", "reference", "scoring"),
)


def plan_faults(count: int, seed: int) -> list[list[Fault]]:
    """A schedule: every stage of every model in turn, kinds by lot, cut to runs.

    Every second fault of a model's saves strikes the thread that writes, in the midst of a file.

    Args:
        count: faults in all.
        seed: of the lots.
    """
    lots = random.Random(seed)
    places = [(model, stage) for model, stages in FAULTS.items() for stage in stages]
    faults: list[Fault] = []
    num_saves = {"policy_trainer": seed, "value_trainer": seed + 1}
    while len(faults) < count:
        lots.shuffle(places)
        for model, stage in places:
            kind = lots.choices(["kill", "exit", "stop", "pause", "driver"], [5, 2, 2, 1, 1])[0]
            moment = ""
            if stage == "saving":
                moment = "writing" if num_saves[model] % 2 else ""
                num_saves[model] += 1
            faults.append(Fault(kind, model, stage, moment))
    faults = faults[:count]
    return [faults[at : at + _PER_RUN] for at in range(0, count, _PER_RUN)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the soak; the exit code is 0 where every fault was survived."""
    parsed = _parse(arguments)
    if parsed.save_kills:
        from scripts.faults.save_kills import kill_while_saving

        result = kill_while_saving(parsed.save_kills, parsed.seed, _tell)
        sys.stdout.write(json.dumps(result.to_json()) + "\n")
        return 0 if result.is_good else 1
    base = Path(tempfile.mkdtemp(prefix="chatlearn-soak-"))
    try:
        report = _soak(parsed, base)
    finally:
        if not parsed.keep:
            shutil.rmtree(base, ignore_errors=True)
    result = report.to_json()
    if not parsed.json:
        _print_table(result["rows"])
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if report.is_good else 1


def _soak(parsed: argparse.Namespace, base: Path) -> Report:
    schedule = [list(SHORT)] if parsed.short else plan_faults(parsed.faults, parsed.seed)
    memory = shared_memory()
    report = Report()
    if schedule:
        report.add(_let_happen(schedule, base, is_wide=not parsed.short))
    if parsed.nodes:
        from scripts.faults.nodes import lose_nodes

        report.add(lose_nodes(base, parsed.nodes, parsed.seed, _LIMIT_S, _tell))
    report.left += sorted(shared_memory() - memory)
    return report


def _let_happen(schedule: list[list[Fault]], base: Path, *, is_wide: bool) -> Report:
    num_episodes = 2 * max(map(len, schedule)) + 6
    _tell(f"the undisturbed run: {num_episodes} episodes")
    reference = base / "undisturbed"
    config = write_workload(reference, num_episodes, is_wide=is_wide)
    expected = run_undisturbed(reference, config, uuid.uuid4().hex, 600.0)
    report = Report()
    for number, faults in enumerate(schedule):
        folder = base / f"run-{number}"
        config = write_workload(folder, num_episodes, is_wide=is_wide)
        campaign = Campaign(folder, config, uuid.uuid4().hex, limit_s=_LIMIT_S)
        start_s = time.monotonic()
        found = campaign.survive(faults, expected)
        report.add(found)
        survived = sum(outcome.survived for outcome in found.outcomes)
        is_same = found.same_training_samples and found.same_metrics
        _tell(
            f"run {number + 1} of {len(schedule)}: {survived} of {len(found.outcomes)} survived, "
            f"samples and metrics {'the same' if is_same else 'DIFFER'}, "
            f"{time.monotonic() - start_s:.0f} s"
        )
    return report


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Faults for a tiny PPO run.")
    parser.add_argument("--faults", type=int, default=12, help="how many, besides --nodes")
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
    sys.stdout.write(
        "| fault | model | stage | outcome | seconds | details |\n|---|---|---|---|---|---|\n"
    )
    for row in rows:
        sys.stdout.write(
            f"| {row['fault']} | {row['model']} | {row['stage']} | {row['outcome']} | "
            f"{row['recovery_s']:.1f} | {row['details']} |\n"
        )


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
