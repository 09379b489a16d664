"""A process that keeps freed memory does not fault its pages in again."""

import os
import subprocess
import sys

from chatlearn.runtime.freed_memory import build_allocator_environment

_PROGRAM = """
import resource, sys, torch
from chatlearn.runtime.freed_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def count_faults(choice, **variables):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment = {**clean, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, choice],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


def test_freed_memory_is_used_again():
    # 64 MiB have 16 thousand pages of 4 KiB, or 32 of 2 MiB; the heap may grow once more.
    assert count_faults("give back") > 4 * count_faults("keep")


def test_the_variables_do_the_same_for_a_new_process():
    assert count_faults("give back") > 4 * count_faults("none", **build_allocator_environment())


def test_the_users_own_settings_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert build_allocator_environment() == {}
