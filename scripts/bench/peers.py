"""The peers' environment, and the weights that all sides start from."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.bench.measures import say
from scripts.bench.rounds import BenchError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

__all__ = ["peer_python", "start_weights"]

_ROOT = Path(__file__).resolve().parents[2]
_SETUP_S = 1800.0
_START_S = 300.0
_LOG_CHARACTERS = 3000


def peer_python() -> str:
    """The interpreter of the peers' environment, which is built where it is not there.

    Raises:
        BenchError: it cannot be built.
    """
    folder = _ROOT / os.environ.get("VENV_BENCH", ".venv-bench")
    if not (folder / ".ready").is_file():
        say(f"building {folder} for the peers, some minutes once")
        command = ["make", "bench-setup"]
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=_SETUP_S, check=False
        )
        if done.returncode:
            raise BenchError(f"`make bench-setup` failed:\n{done.stderr[-_LOG_CHARACTERS:]}")
    return str(folder / "bin" / "python")


@contextmanager
def start_weights(shape: Mapping[str, Any]) -> Generator[str]:
    """A Hugging Face folder with the weights that every side starts from; it goes with the block.

    Args:
        shape: fields of a `Shape`.

    Raises:
        BenchError: it cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as folder:
        module = "scripts.bench.sides.write_llama"
        command = [peer_python(), "-m", module, json.dumps(dict(shape)), folder]
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        if done.returncode:
            raise BenchError(f"{module} failed:\n{done.stderr[-_LOG_CHARACTERS:]}")
        yield folder
