"""What the benchmarks beside peers can all be told on the command line."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["add_peer_arguments", "build_parser"]


def build_parser(
    prog: str, description: str | None, parts: Sequence[str], *, num_rounds: int
) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark.

    Args:
        prog: the program's path.
        description: of it.
        parts: what it can measure.
        num_rounds: of each side, where nothing else is said.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--rounds", type=int, default=num_rounds, help="of each side")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--quick", action="store_true", help="tiny: only to see it run")
    return parser


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of those that decode."""
    parser.add_argument("--num-slots", type=int, help="ours: sequences in flight; its default: all")
    parser.add_argument("--peer-dtypes", nargs="+", choices=("float32", "bfloat16"))
