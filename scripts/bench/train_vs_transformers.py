"""Training steps of this project beside transformers', in one run.

A `PolicyTrainer` and a transformers Llama of the same weights make supervised steps on the same
rows in turns; then the share of the machine's matrix-product rate that a step reaches. A
measurement with company is worthless: run it alone on the machine.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:
    # Started as a file: what is beside it must not hide installed packages.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.bench.command_line import build_parser
from scripts.bench.dtypes import list_dtypes
from scripts.bench.measures import (
    Measure,
    check_equal_parameters,
    compute_rates,
    find_best_peer,
    print_measures,
    say,
    spread,
    warn_of_company,
)
from scripts.bench.peers import peer_python, start_weights
from scripts.bench.rounds import BenchError, SideSpec, alternate, start_sides
from scripts.bench.sides.steps import StepPlan
from scripts.bench.workload import BENCH_SHAPE, WIDE_SHAPE, Shape

__all__ = ["build_plan", "main", "parse_arguments"]

_PARTS = ("packed", "fixed", "mfu")
_OURS, _PEER = "chatlearn", "transformers"
_MATMUL_SIZE = 2048


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; gives the exit code."""
    given = parse_arguments(arguments)
    measures: list[Measure] = []
    try:
        for part in given.parts:
            measures.append(_measure_mfu(given) if part == "mfu" else _compare(given, part))
    except (BenchError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print_measures("Training steps, medians", measures, as_json=given.json)
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    prog = "scripts/bench/train_vs_transformers.py"
    parser = build_parser(prog, __doc__, _PARTS, num_rounds=7)
    parser.add_argument("--mfu-rows", type=int, default=16, help="of 256 tokens, in the wide step")
    return parser.parse_args(arguments)


def build_plan(part: str, *, is_quick: bool = False, mfu_rows: int = 16) -> StepPlan:
    """Which rows a step of this part gets."""
    if is_quick:
        return StepPlan(8, 4, 32, is_variable=part == "packed")
    return {
        "packed": StepPlan(64, 16, 512, is_variable=True),
        "fixed": StepPlan(64, 64, 96, is_variable=False),
        "mfu": StepPlan(mfu_rows, mfu_rows, 256, is_variable=False),
    }[part]


def _options(given: argparse.Namespace, part: str) -> dict[str, Any]:
    shape = WIDE_SHAPE if part == "mfu" else BENCH_SHAPE
    if given.quick:
        shape = Shape(num_layers=1, hidden_size=64, ffn_hidden_size=128)
    plan = build_plan(part, is_quick=given.quick, mfu_rows=given.mfu_rows)
    return {"shape": asdict(shape), "plan": asdict(plan), "num_threads": given.threads}


def _compare(given: argparse.Namespace, part: str) -> Measure:
    """Real tokens per second against transformers.

    Rows of one length are compared at the same dtype; packed ones with transformers' better one.
    """
    options = _options(given, part)
    with start_weights(options["shape"]) as folder:
        return _run_sides(given, part, {**options, "weights": folder})


def _run_sides(given: argparse.Namespace, part: str, options: Mapping[str, Any]) -> Measure:
    threads = given.threads
    with start_sides([SideSpec(_OURS, "engine_train", options, num_threads=threads)]) as ours:
        dtype = ours[0].hello["dtype"]
        specs = [
            SideSpec(
                f"{_PEER} {each}",
                "peer_transformers",
                {**options, "dtype": each},
                peer_python(),
                threads,
            )
            for each in ([dtype] if part == "fixed" else list_dtypes())
        ]
        with start_sides(specs) as peers:
            sides = [*ours, *peers]
            say(f"train_{part}: all sides are up")
            warn_of_company()
            num_parameters = check_equal_parameters(sides)
            order = {"warm": 1, "pieces": 2}
            found = alternate(sides, order, num_rounds=given.rounds, warmup={})
    rates = {side: compute_rates(reports, "tokens") for side, reports in found.items()}
    best = find_best_peer(rates, _OURS)
    details = {
        "dtype": dtype,
        "peer_dtype": best.rpartition(" ")[2],
        "backend": "one process",
        "layout": "one rank",
        "spread": max(spread(values) for values in rates.values()),
        "parameters": num_parameters,
        "rates": {side: [round(value) for value in rate] for side, rate in rates.items()},
    }
    rows = "64 rows of 96" if part == "fixed" else "64 long-tailed rows, cap 512"
    ours, peer = (statistics.median(rates[side]) for side in (_OURS, best))
    what = f"training step, {rows}, against transformers"
    bar = 1.1 if part == "fixed" else 2.0
    return Measure(f"train_{part}", what, ours, peer, "real tokens/s", bar, details=details)


def _measure_mfu(given: argparse.Namespace) -> Measure:
    """A step's rate over that of a matrix product in the same process, in turns."""
    fields = {"bf16": "bfloat16" in list_dtypes()}
    options = {**_options(given, "mfu"), "fields": fields}
    size = 256 if given.quick else _MATMUL_SIZE
    steps: list[float] = []
    products: list[float] = []
    with start_sides(
        [SideSpec(_OURS, "engine_train", options, num_threads=given.threads)]
    ) as sides:
        dtype = sides[0].hello["dtype"]
        warn_of_company()
        sides[0].run({})
        for _ in range(min(given.rounds, 3)):
            products.append(sides[0].run({"matmul": size})["amounts"]["flops_per_s"])
            steps += compute_rates([sides[0].run({})], "flops")
    details = {
        "dtype": dtype,
        "spread": max(spread(steps), spread(products)),
        "parameters": sides[0].hello["num_parameters"],
    }
    ours, product = statistics.median(steps) / 1e9, statistics.median(products) / 1e9
    what = f"FLOP utilisation of a {dtype} step at hidden 1,024, against a {size}^3 product"
    return Measure("train_mfu", what, ours, product, "GFLOP/s", 0.6, details=details)


if __name__ == "__main__":
    # Without this a SIGTERM would leave the sides behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
