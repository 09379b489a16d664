"""Importing the packages is quick: torch, ray and Megatron load when they are first needed."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 0.3
HEAVY = ("torch", "ray", "megatron")


def _run(code):
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def _cpu_seconds(statement):
    """Processor time of an interpreter that runs `statement`, best of three.

    Not the clock's time, which depends on what else the machine does.
    """
    code = f"{statement}\nimport time\nprint(time.process_time())"
    return min(float(_run(code)) for _ in range(3))


@pytest.mark.parametrize("package", ["chatlearn", "megatron_adapters"])
def test_importing_a_package_is_quick(package):
    assert _cpu_seconds(f"import {package}") - _cpu_seconds("pass") < LIMIT_S


@pytest.mark.parametrize("package", ["chatlearn", "megatron_adapters"])
def test_importing_a_package_loads_neither_torch_nor_ray(package):
    loaded = _run(f"import {package}, sys\nprint([n for n in {HEAVY!r} if n in sys.modules])")
    assert loaded == "[]"
