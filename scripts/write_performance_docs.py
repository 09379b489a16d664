"""Writes the generated sections of docs/performance.md from what the benchmarks printed.

    python -m scripts.write_performance_docs FILE...

Each file holds the output of one benchmark that was run with `--json`; `make bench-docs` runs them
all and then this.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if not __package__:
    # Started as a file: what is beside it must not hide installed packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.bench.budget import StepSize, bound_seconds, list_stages
from scripts.bench.workload import BENCH_SHAPE

__all__ = ["fill_section", "main", "render_budget", "render_measured"]

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
_THREADS = "2"
# Which model is busy in a stage, and stages that are part of another's time.
_MODELS = {
    "decoding": "policy",
    "reference": "reference",
    "forward and backward": "policy_trainer",
    "weight sync": "sync",
    "together": "",
}
_MEASURED_WITH = {"prompts, each once": "with decoding", "optimizer": "with the passes"}
# Figures of a measure that stand beside its two sides, and what they are called.
_BESIDE = {
    "bare_loop": "bare loop",
    "ours_64_slots": "ours with 64 slots",
    "ray": "ray",
    "spread": "spread",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the sections; gives the exit code."""
    files = sys.argv[1:] if arguments is None else arguments
    found = [json.loads(Path(name).read_text("utf-8").splitlines()[-1]) for name in files]
    limits = next((each for each in found if "matmul_gflops" in each), None)
    measured = [each for each in found if "measures" in each]
    every: dict[str, Any] = {}
    for each in measured:
        every |= each["measures"]
    fixed: Mapping[str, Any] = every.get("grpo_fixed", {})
    budget = render_budget(limits, fixed.get("stages_ms"), fixed.get("dtype", "float32"))
    text = fill_section(_PAGE.read_text("utf-8"), "budget", budget)
    if measured:
        today = datetime.now(UTC).strftime("%Y-%m-%d")
        text = fill_section(text, "measured", render_measured(measured, today))
    _PAGE.write_text(text, encoding="utf-8")
    return 0


def fill_section(text: str, name: str, content: str) -> str:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: the page has no such section.
    """
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    _, also_found, tail = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"the page has no section between {begin.strip()} and {end}")
    return f"{head}{begin}{content}{end}{tail}"


def render_budget(
    limits: Mapping[str, Any] | None,
    stages_ms: Mapping[str, float] | None = None,
    dtype: str = "float32",
) -> str:
    """The stages of the benchmark's step.

    Args:
        limits: of the machine; with them also the least time of each stage.
        stages_ms: how long each model was busy in a measured step; printed beside that.
        dtype: of weights and activations.
    """
    stages = list_stages(BENCH_SHAPE, StepSize(element_bytes=4 if dtype == "float32" else 2))
    rows = [[s.name, _billions(s.flops), _billions(s.num_bytes)] for s in stages]
    names = ["stage", "GFLOP", "GB"]
    if limits is None:
        return _table(names, rows)
    flops_per_s = 1e9 * limits["matmul_gflops"][dtype][_THREADS]
    copied_per_s = 1e9 * limits["copy_gb_per_s"][_THREADS]
    bounds = [
        bound_seconds(s, flops_per_s=flops_per_s, bytes_per_s=2 * copied_per_s) for s in stages
    ]
    names.append("at least, ms")
    for row, bound in zip(rows, bounds, strict=True):
        row.append(f"{bound * 1e3:.0f}")
    total = [sum(s.flops for s in stages), sum(s.num_bytes for s in stages)]
    rows.append(["together", *map(_billions, total), f"{sum(bounds) * 1e3:.0f}"])
    if stages_ms:
        names.append("measured, ms")
        for row in rows:
            row.append(_MEASURED_WITH.get(row[0]) or f"{stages_ms.get(_MODELS[row[0]], 0.0):.0f}")
        rows[-1][-1] = f"{sum(stages_ms.values()):.0f}"
    note = (
        f"\nLimits of the machine, {_THREADS} threads: {flops_per_s / 1e9:.0f} GFLOP/s in {dtype}, "
        f"{2 * copied_per_s / 1e9:.1f} GB/s of memory, read and written together.\n"
    )
    return _table(names, rows) + note


def render_measured(results: Sequence[Mapping[str, Any]], date: str) -> str:
    """The measures with their bars, and the machine they were taken on."""
    rows = [_row(name, each) for found in results for name, each in found["measures"].items()]
    for found in results:
        rows += [_row(f"{name}, ray", each) for name, each in found.get("other", {}).items()]
    machine = results[0]["machine"]
    note = (
        f"\nMeasured on {date}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gb']:g} GB, {_THREADS} threads a side.\n"
    )
    dtypes = "dtype (ours / peer)"
    names = ["measure", "what", "ours", "peer", "", "beside", dtypes, "ratio", "bar", "met"]
    return _table(names, rows) + note


def _row(name: str, measure: Mapping[str, Any]) -> list[str]:
    beside = ", ".join(f"{_BESIDE[k]} {_show(measure[k])}" for k in _BESIDE if k in measure)
    return [
        f"`{name}`",
        measure["what"],
        _show(measure["ours"]),
        _show(measure["peer"]),
        measure["unit"],
        beside,
        " / ".join(str(measure[k]) for k in ("dtype", "peer_dtype") if k in measure),
        f"{measure['ratio']:.2f}",
        f"{measure['bar']:g}",
        "yes" if measure["is_met"] else "no",
    ]


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _billions(value: float) -> str:
    return f"{value / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main())
