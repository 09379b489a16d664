"""Decoding of this project beside transformers' `generate`, in one run.

A `PolicyInference` and a transformers Llama of the same weights answer prompts in turns; beside
them a bare decode loop in torch, or this project with 64 slots. A measurement with company is
worthless: run it alone on the
machine.
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

from scripts.bench.command_line import add_peer_arguments, build_parser
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
from scripts.bench.workload import BENCH_SHAPE, Shape

__all__ = ["build_options", "main", "parse_arguments"]

_PARTS = ("fixed", "variable")
_OURS, _BARE = "chatlearn", "bare loop"
# As few sequences in flight as transformers' batches have; then they enter freed slots.
_FEW_SLOTS = "chatlearn, 64 slots"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; gives the exit code."""
    given = parse_arguments(arguments)
    measures: list[Measure] = []
    try:
        dtypes = given.peer_dtypes or list_dtypes()
        measures += [
            _compare(given, dtypes, is_variable=part == "variable") for part in given.parts
        ]
    except (BenchError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print_measures("Decoding, medians", measures, as_json=given.json)
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    prog = "scripts/bench/generate_vs_transformers.py"
    parser = build_parser(prog, __doc__, _PARTS, num_rounds=7)
    add_peer_arguments(parser)
    return parser.parse_args(arguments)


def build_options(given: argparse.Namespace, *, is_variable: bool) -> dict[str, Any]:
    """What all sides are told."""
    shape = Shape(num_layers=1, hidden_size=64, ffn_hidden_size=128) if given.quick else BENCH_SHAPE
    new_tokens = 256 if is_variable else 64
    return {
        "shape": asdict(shape.for_variable_lengths() if is_variable else shape),
        "is_variable": is_variable,
        "num_requests": 256 if is_variable else 64,
        "batch_size": 64,
        "prompt_length": 32,
        "new_tokens": 8 if given.quick else new_tokens,
        "num_slots": given.num_slots,
        "num_threads": given.threads,
    }


def _compare(given: argparse.Namespace, dtypes: Sequence[str], *, is_variable: bool) -> Measure:
    """Tokens per second against transformers, and beside a bare loop where lengths are fixed."""
    name = "decode_variable" if is_variable else "decode_fixed"
    options = build_options(given, is_variable=is_variable)
    with start_weights(options["shape"]) as folder:
        return _run_sides(given, dtypes, name, {**options, "weights": folder})


def _run_sides(
    given: argparse.Namespace, dtypes: Sequence[str], name: str, options: Mapping[str, Any]
) -> Measure:
    is_variable, threads = options["is_variable"], given.threads
    python = peer_python()
    specs = [SideSpec(_OURS, "engine_decode", options, num_threads=threads)]
    specs += [
        SideSpec(f"transformers {d}", "peer_transformers", {**options, "dtype": d}, python, threads)
        for d in dtypes
    ]
    if is_variable:
        few = {**options, "num_slots": options["batch_size"]}
        specs.insert(1, SideSpec(_FEW_SLOTS, "engine_decode", few, num_threads=threads))
    else:
        specs += [
            SideSpec(f"{_BARE} {d}", "bare_decode", {**options, "dtype": d}, num_threads=threads)
            for d in dtypes
        ]
    with start_sides(specs) as sides:
        say(f"{name}: all sides are up")
        warn_of_company()
        num_parameters = check_equal_parameters(sides)
        found = alternate(sides, {}, num_rounds=given.rounds, warmup={})
        dtype = sides[0].hello["dtype"]
    rates = {side: compute_rates(reports, "tokens") for side, reports in found.items()}
    beside = (_BARE, _FEW_SLOTS)
    peers = {side: rate for side, rate in rates.items() if not side.startswith(beside)}
    best = find_best_peer(peers, _OURS)
    details: dict[str, Any] = {
        "dtype": dtype,
        "peer_dtype": best.rpartition(" ")[2],
        "backend": "one process",
        "layout": "one rank",
        "spread": max(spread(values) for values in rates.values()),
        "parameters": num_parameters,
    }
    if f"{_BARE} {dtype}" in rates:
        details["bare_loop"] = statistics.median(rates[f"{_BARE} {dtype}"])
    if _FEW_SLOTS in rates:
        details["ours_64_slots"] = statistics.median(rates[_FEW_SLOTS])
    details["rates"] = {side: [round(value) for value in rate] for side, rate in rates.items()}
    fixed, variable = "64 x 64 tokens after 32", "256 requests of up to 256 tokens"
    what = f"decoding, {variable if is_variable else fixed}, against transformers"
    ours, peer = (statistics.median(rates[side]) for side in (_OURS, best))
    bar = 4.0 if is_variable else 1.6
    return Measure(name, what, ours, peer, "tokens/s", bar, details=details)


if __name__ == "__main__":
    # Without this a SIGTERM would leave the sides behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
