"""`chatlearn convert`: models between formats; and the table that shows that it is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from chatlearn.cli.tables import print_table
from chatlearn.errors import ConfigError
from chatlearn.models.dotted_path import load_object

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["run_convert"]

_ADAPTER = "megatron_adapters.conversion.command"
_FORMATS = {"hf": "Hugging Face", "megatron": "Megatron", "peft": "PEFT"}


def run_convert(arguments: argparse.Namespace) -> None:
    """`chatlearn convert SOURCE TARGET --to hf | megatron | peft`, or `--parity-table`."""
    if arguments.parity_table:
        _print_parity(arguments.families, as_json=arguments.json)
        return
    if arguments.source is None or arguments.target is None or arguments.to is None:
        raise ConfigError("chatlearn convert SOURCE TARGET --to hf | megatron | peft")
    convert: Any = load_object(f"{_ADAPTER}:convert_folder", "convert")
    with _progress() as progress:
        task = progress.add_task(f"to {_FORMATS[arguments.to]}", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        count = convert(arguments, show)
    what = f", {count} tensors read back and equal" if count is not None else ""
    sys.stdout.write(f"wrote {Path(arguments.target)}{what}\n")


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=Console(stderr=True),
        disable=not sys.stderr.isatty(),
    )


def _print_parity(families: Sequence[str] | None, *, as_json: bool) -> None:
    measure: Any = load_object(f"{_ADAPTER}:measure_parity", "convert")
    console = Console(highlight=False)
    rows: list[dict[str, Any]] = []
    for row in measure(families):
        rows.append(row)
        if not as_json:
            console.print(f"measured {row['family']}, {row['layout']}", markup=False)
    header = ("family", "layout", "largest difference of a logit", "export identical")
    cells = [
        (
            row["family"],
            row["layout"],
            f"{row['max_logit_difference']:.1e}",
            "yes" if row["export_identical"] else "NO",
        )
        for row in rows
    ]
    print_table(console, "beside transformers, float32, 64 random sequences", header, cells)
    if as_json:
        sys.stdout.write(json.dumps({"rows": rows}) + "\n")
