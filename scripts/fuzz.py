"""Damages configs and checkpoint files, and sees that each is accepted or refused in a line.

A case fails that hangs, kills its process, ends in another exception than a `ChatLearnError`, or
runs code of the file; and a change in a run's checkpoint that its manifest does not show.

    python -m scripts.fuzz --cases 2000 --json
    python -m scripts.fuzz --kinds config_text --cases 500 --seed 7
    python -m scripts.fuzz --kinds megatron --only 36
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if not __package__:
    # Started as a file: what is beside it must not hide installed packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.fuzzing.checkpoint_cases import (
    HuggingFaceMaker,
    MegatronMaker,
    RunFolderMaker,
    TorchFileMaker,
)
from scripts.fuzzing.config_cases import OverrideMaker, TextMaker, ValueMaker
from scripts.fuzzing.judging import Outcome, run_cases

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["KINDS", "main", "run_fuzz", "share_cases"]

# How each kind is made, and its share of the cases.
KINDS: Mapping[str, tuple[Callable[..., Any], int]] = {
    "config_text": (TextMaker, 28),
    "config_values": (ValueMaker, 18),
    "config_overrides": (OverrideMaker, 12),
    "torch_files": (TorchFileMaker, 10),
    "megatron": (MegatronMaker, 14),
    "huggingface": (HuggingFaceMaker, 9),
    "run_folder": (RunFolderMaker, 9),
}
_SHOWN_LINES = 12


def share_cases(count: int, kinds: Sequence[str]) -> dict[str, int]:
    """So many cases of each kind that they are `count` in all, each kind by its share."""
    total = sum(KINDS[kind][1] for kind in kinds)
    shares = {kind: max(1, count * KINDS[kind][1] // total) for kind in kinds}
    shares[kinds[0]] += max(0, count - sum(shares.values()))
    return shares


def run_fuzz(
    numbers: Mapping[str, range],
    seed: int,
    limit_s: float,
    tell: Callable[[str], object],
) -> dict[str, Any]:
    """Run cases and count how they end.

    Args:
        numbers: of the cases, by kind.
        seed: of the lots.
        limit_s: of one case.
        tell: gets lines for a person.

    Returns:
        Counts by kind and in all, and what failed.
    """
    kinds: dict[str, dict[str, int]] = {}
    failures: list[Outcome] = []
    start_s = time.monotonic()
    for kind, chosen in numbers.items():
        counts = {"accepted": 0, "refused": 0, "failed": 0}
        for outcome in run_cases(kind, KINDS[kind][0], chosen, seed, limit_s):
            counts[outcome.verdict] += 1
            if outcome.verdict == "failed":
                failures.append(outcome)
                tell(_describe(outcome))
        kinds[kind] = counts
        tell(f"{kind}: {counts}, {time.monotonic() - start_s:.0f} s")
    return {
        "seed": seed,
        "cases": sum(sum(counts.values()) for counts in kinds.values()),
        **{
            verdict: sum(counts[verdict] for counts in kinds.values())
            for verdict in ("accepted", "refused", "failed")
        },
        "kinds": kinds,
        "failures": [
            {"kind": each.kind, "number": each.number, "text": each.text[-300:]}
            for each in failures
        ],
        "seconds": round(time.monotonic() - start_s, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the fuzzer; the exit code is 0 where no case failed."""
    parser = argparse.ArgumentParser(description="Damaged configs and checkpoint files.")
    parser.add_argument("--cases", type=int, default=2000, help="how many in all")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--only", type=int, help="one case of each kind, by its number")
    parser.add_argument("--seed", type=int, default=0, help="of the lots")
    parser.add_argument("--limit-s", type=float, default=60.0, help="of one case")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parsed = parser.parse_args(arguments)
    numbers = {kind: range(n) for kind, n in share_cases(parsed.cases, parsed.kinds).items()}
    if parsed.only is not None:
        numbers = {kind: range(parsed.only, parsed.only + 1) for kind in parsed.kinds}
    result = run_fuzz(numbers, parsed.seed, parsed.limit_s, _tell)
    summary = f"{result['cases']} cases: {result['accepted']} accepted, {result['refused']} refused"
    sys.stdout.write(f"{summary}, {result['failed']} failed\n")
    if parsed.json:
        sys.stdout.write(json.dumps(result) + "\n")
    return 1 if result["failed"] else 0


def _describe(outcome: Outcome) -> str:
    lines = outcome.text.strip().splitlines()[-_SHOWN_LINES:]
    head = f"FAILED {outcome.kind} --only {outcome.number}: {outcome.description[:300]}"
    return "\n    ".join([head, *lines])


def _tell(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
