"""Weight sync beside its bare limit and two other ways, in one run: `scripts/bench/sync.py`.

Moves the weights of a Megatron model between real Ray workers on this host, with layouts that
differ, over shared memory and over gloo, and beside each sync in turn: one memcpy or one raw gloo
transfer of the bytes that must move; gathering each full parameter and broadcasting it, over gloo;
and Megatron-Core's `swap_model_weights` over gloo. A measurement with company is worthless: run it
alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    # Started as a file: what is beside it must not hide installed packages.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from rich.console import Console
from rich.table import Table

from chatlearn.errors import ChatLearnError
from scripts.bench.measures import say, warn_of_company
from scripts.bench.sync_measure import CaseResult, WrongWeightsError, measure_rig
from scripts.bench.sync_rig import CASES, start_rigs

__all__ = ["main", "parse_arguments"]

_HEADS = 12
_PLAIN_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; gives the exit code."""
    options = parse_arguments(arguments)
    shape = _model_shape(options.num_layers, options.hidden_size)
    results: list[CaseResult] = []
    try:
        for case in CASES:
            if case.name in options.cases:
                results += _run_case(case, shape, options.num_repeats)
    except (ChatLearnError, WrongWeightsError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    _print_table(results)
    if options.json:
        print(json.dumps({"cases": [result.as_json() for result in results]}))
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as a namespace."""
    parser = argparse.ArgumentParser(prog="scripts/bench/sync.py", description=__doc__)
    names = [case.name for case in CASES]
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--cases", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--num-repeats", type=_at_least_one, default=5, help="behind each median")
    parser.add_argument("--num-layers", type=_at_least_one, default=8, help="of the model")
    parser.add_argument(
        "--hidden-size",
        type=_at_least_one,
        default=1536,
        help=f"of the model, a multiple of {8 * _HEADS} (default: 1536, 500 MB with 8 layers)",
    )
    options = parser.parse_args(arguments)
    if options.hidden_size % (8 * _HEADS):
        parser.error(f"--hidden-size must be a multiple of {8 * _HEADS}")
    return options


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value


def _model_shape(num_layers: int, hidden_size: int) -> dict[str, Any]:
    """Megatron's fields: grouped heads, SwiGLU, bf16."""
    return {
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": hidden_size * 8 // 3,
        "num_attention_heads": _HEADS,
        "num_query_groups": 4,
        "vocab_size": 16000,
        "max_sequence_length": 128,
        "bf16": True,
    }


def _run_case(case: Any, shape: dict[str, Any], num_repeats: int) -> list[CaseResult]:
    start_s = time.time()
    results: list[CaseResult] = []
    with (
        tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as folder,
        start_rigs(case, shape, Path(folder)) as rigs,
    ):
        say(f"{case.name}: workers are up after {time.time() - start_s:.0f} s")
        warn_of_company()
        for rig in rigs:
            results += measure_rig(case.name, rig, num_repeats)
        say(f"{case.name}: measured after {time.time() - start_s:.0f} s")
    return results


def _print_table(results: Sequence[CaseResult]) -> None:
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else _PLAIN_WIDTH)
    table = Table(title="Weight sync, medians")
    for name in ("case", "over", "colocated"):
        table.add_column(name)
    for name in (
        "MB moved",
        "least MB",
        "ms",
        "limit ms",
        "of limit",
        "gather ms",
        "speedup",
        "Megatron ms",
        "its MB",
        "2 pairs",
        "digests",
    ):
        table.add_column(name, justify="right")
    for each in results:
        pairs = each.two_pairs_seconds
        table.add_row(
            each.case,
            each.transport,
            "yes" if each.colocated else "no",
            f"{each.bytes_moved / 1e6:.0f}",
            f"{each.bytes_minimal / 1e6:.0f}",
            f"{each.seconds * 1e3:.0f}",
            f"{each.limit_seconds * 1e3:.0f}",
            f"{each.fraction_of_limit:.2f}",
            f"{each.gather_broadcast_seconds * 1e3:.0f}",
            f"{each.speedup_over_gather_broadcast:.1f}x",
            f"{each.megatron_seconds * 1e3:.0f}",
            f"{each.megatron_bytes / 1e6:.0f}",
            "" if pairs is None else f"{pairs * 1e3:.0f}",
            f"{each.digest_share:.1%}",
        )
    console.print(table)


if __name__ == "__main__":
    # Without this a SIGTERM would leave Ray and its workers behind.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    sys.exit(main())
