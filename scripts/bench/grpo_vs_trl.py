"""GRPO steps of this project beside TRL's, in one run, from the same weights.

A real `GRPOEngine` (Megatron policy, reference and trainer, a reward in Python, weight sync
included) and TRL's `GRPOTrainer` make steps in turns, each in processes of its own that sleep
while the other works. Then the peak memory of each, alone. A measurement with company is
worthless: run it alone on the machine.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
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
from scripts.bench.memory import PeakMemory
from scripts.bench.peers import peer_python, start_weights
from scripts.bench.rounds import BenchError, Side, SideSpec, alternate, start_sides
from scripts.bench.timeline_overhead import Span, compute_overhead, read_spans, sum_by_model
from scripts.bench.workload import BENCH_SHAPE, Shape

__all__ = ["build_options", "main", "parse_arguments"]

_PARTS = ("fixed", "variable", "memory", "ray")
_OURS = "chatlearn"
_OVERHEAD = "engine_overhead"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; gives the exit code."""
    given = parse_arguments(arguments)
    measures: list[Measure] = []
    other: list[Measure] = []
    try:
        dtypes = given.peer_dtypes or list_dtypes()
        best = dtypes[-1]
        if "fixed" in given.parts:
            found = _compare(given, "local", dtypes, is_variable=False)
            measures += found
            best = found[0].details["peer_dtype"]
        if "variable" in given.parts:
            measures += _compare(given, "local", dtypes, is_variable=True)[:1]
        if "memory" in given.parts:
            measures.append(_measure_memory(given, best))
        if "ray" in given.parts:
            other += _compare(given, "ray", [best], is_variable=False)
    except (BenchError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    print_measures("GRPO steps, medians", measures, other, as_json=given.json)
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = build_parser("scripts/bench/grpo_vs_trl.py", __doc__, _PARTS, num_rounds=5)
    add_peer_arguments(parser)
    parser.add_argument("--steps", type=int, default=2, help="of each round")
    parser.add_argument("--micro-batch-size", type=int, default=64, help="ours: rows of a pass")
    parser.add_argument("--old-logprobs", choices=("recompute", "rollout"), help="ours")
    return parser.parse_args(arguments)


def build_options(
    given: argparse.Namespace, *, is_variable: bool, num_steps: int
) -> dict[str, Any]:
    """What both sides are told."""
    shape = Shape(num_layers=1, hidden_size=64, ffn_hidden_size=128) if given.quick else BENCH_SHAPE
    new_tokens = 256 if is_variable else 64
    return {
        "shape": asdict(shape.for_variable_lengths() if is_variable else shape),
        "is_variable": is_variable,
        "new_tokens": 16 if given.quick else new_tokens,
        "prompt_length": 32,
        "num_prompts": 8,
        "num_samples": 8,
        "num_steps": num_steps,
        "num_threads": given.threads,
        "lr": 1e-6,
        "kl_coef": 0.04,
        "num_slots": given.num_slots,
        "micro_batch_size": given.micro_batch_size,
        "algorithm": {"old_logprobs": given.old_logprobs} if given.old_logprobs else {},
    }


def _ours(options: Mapping[str, Any], backend: str, folder: str) -> SideSpec:
    own = {**options, "backend": backend, "output_dir": folder}
    return SideSpec(_OURS, "engine_grpo", own, num_threads=options["num_threads"])


def _trl(options: Mapping[str, Any], dtype: str) -> SideSpec:
    own = {**options, "dtype": dtype}
    threads = options["num_threads"]
    return SideSpec(f"trl {dtype}", "peer_trl", own, peer_python(), threads)


def _compare(
    given: argparse.Namespace, backend: str, dtypes: Sequence[str], *, is_variable: bool
) -> list[Measure]:
    """Samples per second against TRL, then the engine's overhead."""
    name = "grpo_variable" if is_variable else "grpo_fixed"
    # The warm-up, the rounds, and the one that waits for the end.
    num_steps = (given.rounds + 1) * given.steps + 1
    options = build_options(given, is_variable=is_variable, num_steps=num_steps)
    order = {"steps": given.steps}
    with (
        tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as folder,
        start_weights(options["shape"]) as weights,
    ):
        options["weights"] = weights
        specs = [_ours(options, backend, folder), *(_trl(options, d) for d in dtypes)]
        with start_sides(specs) as sides:
            say(f"{name}: all sides are up")
            warn_of_company()
            num_parameters = check_equal_parameters(sides)
            found = alternate(sides, order, num_rounds=given.rounds, warmup=order)
            dtype = sides[0].hello["dtype"]
        overhead, stages_ms = _read_timeline(Path(folder), found[_OURS], given.steps)
    rates = {side: compute_rates(reports, "samples") for side, reports in found.items()}
    best = find_best_peer(rates, _OURS)
    details = {
        "dtype": dtype,
        "peer_dtype": best.rpartition(" ")[2],
        "backend": backend,
        "layout": "one rank a model",
        "spread": max(spread(values) for values in rates.values()),
        "mean_tokens": _mean_tokens(found[_OURS]),
        "peer_mean_tokens": _mean_tokens(found[best]),
        "parameters": num_parameters,
        "stages_ms": stages_ms,
        "rates": {side: [round(value, 3) for value in rate] for side, rate in rates.items()},
    }
    ours, peer = (statistics.median(rates[side]) for side in (_OURS, best))
    lengths = "lengths up to 256" if is_variable else "64 new tokens"
    bar = 4.0 if is_variable else 1.7
    what = f"GRPO step, 8 x 8 samples, {lengths}, against TRL"
    return [Measure(name, what, ours, peer, "samples/s", bar, details=details), overhead]


def _read_timeline(
    folder: Path, reports: Sequence[Mapping[str, Any]], num_steps: int
) -> tuple[Measure, dict[str, float]]:
    """The engine's overhead, and the milliseconds that each model is busy in a step.

    In one process, where all models take turns, the time in which one is busy is the critical
    path. The metric of the run cannot serve: here an episode also waits for the other side's turn.
    """
    run_dir = max(folder.glob("*/*/timeline.json")).parent
    windows = [Span(report["start_s"], report["end_s"]) for report in reports]
    spans = read_spans(run_dir / "timeline.json")
    shares = compute_overhead(spans, windows)
    details: dict[str, Any] = {"rounds": [round(share, 4) for share in shares]}
    percent = 100 * statistics.median(shares)
    what = "share of a step's wall time in which no worker is busy"
    overhead = Measure(_OVERHEAD, what, percent, 3.0, "%", 1.0, is_cap=True, details=details)
    busy = sum_by_model(spans, windows)
    return overhead, {name: round(1e3 * s / num_steps, 1) for name, s in busy.items()}


def _measure_memory(given: argparse.Namespace, peer_dtype: str) -> Measure:
    """Peak of each side's process tree while it makes steps, one side alive at a time."""
    options = build_options(given, is_variable=False, num_steps=2 * given.steps + 1)
    peaks: dict[str, float] = {}
    with (
        tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as folder,
        start_weights(options["shape"]) as weights,
    ):
        options["weights"] = weights
        specs = {
            "local": _ours(options, "local", folder),
            "ray": _ours(options, "ray", folder),
            "trl": _trl(options, peer_dtype),
        }
        for name, spec in specs.items():
            with start_sides([spec]) as sides:
                peaks[name] = _peak_megabytes(sides[0], {"steps": given.steps})
            say(f"grpo_memory: {name} {peaks[name]:.0f} MB")
    what = "peak memory of GRPO steps (PSS of all processes), local backend, against TRL"
    details = {"backend": "local", "ray": peaks["ray"], "peer_dtype": peer_dtype}
    ours, peer = peaks["local"], peaks["trl"]
    return Measure("grpo_memory", what, ours, peer, "MB", 1.0, is_cap=True, details=details)


def _peak_megabytes(side: Side, order: Mapping[str, Any]) -> float:
    side.run(order)
    with PeakMemory(side.process_id) as memory:
        side.run(order)
    return memory.peak_bytes / 1e6


def _mean_tokens(reports: Sequence[Mapping[str, Any]]) -> float:
    tokens = sum(report["amounts"]["tokens"] for report in reports)
    return tokens / sum(report["amounts"]["samples"] for report in reports)


if __name__ == "__main__":
    # Without this a SIGTERM would leave the sides behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main())
