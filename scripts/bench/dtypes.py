"""Which dtypes are worth trying for a peer on this processor."""

from __future__ import annotations

import json
import subprocess
import sys

from scripts.bench.measures import say
from scripts.bench.rounds import BenchError

__all__ = ["list_dtypes"]

_TIMEOUT_S = 120.0


def list_dtypes() -> list[str]:
    """float32, and bfloat16 where a quick matrix product shows that the processor can do it.

    Asked in a process of its own, so that this one never loads torch: its pages would count as
    shared in a measurement of memory.

    Raises:
        BenchError: that process failed.
    """
    command = [sys.executable, "-m", "scripts.bench.limits", "--probe"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise BenchError(f"scripts/bench/limits.py failed:\n{done.stderr}")
    if json.loads(done.stdout.splitlines()[-1])["has_fast_bf16"]:
        return ["float32", "bfloat16"]
    say("bfloat16 is left out: this processor multiplies it slower than half of float32's rate")
    return ["float32"]
