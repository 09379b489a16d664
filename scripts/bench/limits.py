"""What this machine can do: matrix products by dtype and threads, and copies of memory.

The rates that `docs/performance.md` and the benchmarks hold the stages of a step against. A
measurement with company is worthless: run it alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["has_fast_bf16", "main", "measure_copy", "measure_matmul"]

_SECONDS = 0.5
_PROBE = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; gives the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench/limits.py", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--probe", action="store_true", help="only whether bf16 is fast here")
    parser.add_argument("--size", type=int, default=2048, help="of the square matrices")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--copy-mb", type=int, default=256, help="of each copy")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"has_fast_bf16": has_fast_bf16()}
    if options.probe:
        print(json.dumps(found))
        return 0
    found.update(size=options.size, matmul_gflops={}, copy_gb_per_s={})
    for threads in sorted(set(options.threads)):
        torch.set_num_threads(threads)
        copied = measure_copy(options.copy_mb << 20)
        found["copy_gb_per_s"][str(threads)] = round(copied / 1e9, 2)
        print(f"memory copy, {threads} threads: {copied / 1e9:.1f} GB/s read and as many written")
        for dtype in (torch.float32, torch.bfloat16):
            rate, name = measure_matmul(options.size, dtype), str(dtype).removeprefix("torch.")
            found["matmul_gflops"].setdefault(name, {})[str(threads)] = round(rate / 1e9, 2)
            print(f"{name} matrix product, {threads} threads: {rate / 1e9:.1f} GFLOP/s")
    if options.json:
        print(json.dumps(found))
    return 0


def measure_matmul(size: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """Floating-point operations per second of a product of two square matrices.

    A processor without units for bf16 needs minutes for large ones: there a small product stands
    for them.
    """
    if dtype is torch.bfloat16 and device == "cpu" and size > _PROBE and not has_fast_bf16():
        size = _PROBE
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    return 2.0 * size**3 / _median_seconds(lambda: torch.mm(left, right, out=out), device)


def has_fast_bf16() -> bool:
    """Whether bf16 is worth a try here: its small product is at least half as fast as fp32's.

    With one thread, so that the answer does not hang on what else runs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = [measure_matmul(_PROBE, dtype) for dtype in (torch.bfloat16, torch.float32)]
    finally:
        torch.set_num_threads(threads)
    return rates[0] > rates[1] / 2


def measure_copy(num_bytes: int, device: str = "cpu") -> float:
    """Bytes per second of copying a block: each is read once and written once."""
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    return num_bytes / _median_seconds(lambda: target.copy_(source), device)


def _median_seconds(work: Callable[[], object], device: str) -> float:
    """Of repeats that take half a second together, after one that does not count."""
    work()
    seconds: list[float] = []
    total_s = 0.0
    while total_s < _SECONDS or len(seconds) < 3:
        if device != "cpu":
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
        total_s += seconds[-1]
    return statistics.median(seconds)


if __name__ == "__main__":
    sys.exit(main())
