"""What is left of worker processes once they have ended."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.runtime import worker_ends


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait(10)


def leave_file(process_id):
    path = Path(f"/dev/shm/torch_{process_id}_7_0")
    path.write_bytes(b"counters")
    return path


def test_a_worker_that_is_killed_leaves_no_counters_of_gpu_tensors(sleeper):
    kept, gone = leave_file(os.getpid()), leave_file(sleeper.pid)
    try:
        worker_ends._kill(sleeper.pid)
        assert sleeper.poll() is not None
        assert not gone.exists()
        assert kept.exists()
    finally:
        kept.unlink()


def test_files_of_a_process_that_lives_on_stay(sleeper, monkeypatch):
    monkeypatch.setattr(worker_ends, "_GONE_S", 0.2)
    kept = leave_file(sleeper.pid)
    try:
        worker_ends._sweep(sleeper.pid)
        assert kept.exists()
    finally:
        kept.unlink()
    worker_ends._sweep(sleeper.pid)


def test_files_of_a_process_that_is_gone_are_removed(sleeper):
    left = leave_file(sleeper.pid)
    sleeper.kill()
    sleeper.wait(10)
    worker_ends._sweep(sleeper.pid)
    assert not left.exists()
