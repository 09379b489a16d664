"""A call that does not end says where every worker is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from chatlearn import BaseModule, Engine
from chatlearn import Trainer as TrainerFlow
from chatlearn.errors import WaitTimeoutError, WorkerError

pytestmark = pytest.mark.alone


class Waiting(BaseModule):
    """Rank 0 waits for the others in a collective, rank 1 sleeps, rank 2 is stopped."""

    def train_step(self, data):
        if self.rank == 1:
            time.sleep(60)
        if self.rank == 2:
            time.sleep(2.5)  # long enough to be heard of
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.zeros(3, 5))


class Stopped(BaseModule):
    """One of two ranks is stopped for good."""

    def train_step(self, data):
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce(torch.zeros(1))


def engine_of(module):
    return Engine(None, TrainerFlow(lambda b: module.train_step(b))).set_dataset([1, 2, 3])


def test_the_error_tells_stack_stage_and_collective_of_every_worker(learn):
    settings = {"stage_timeout_s": 5, "heartbeat_timeout_s": None}
    with pytest.raises(WaitTimeoutError) as caught:
        learn(engine_of(Waiting("waiting")), {"waiting": {"num_gpu": 3}}, **settings)
    text = str(caught.value)
    assert "stages outlasted runtime.stage_timeout_s=5: waiting.train_step on waiting.r0." in text
    reports = read_reports(text)
    assert "run_train train_step for" in reports["0"]
    assert "in all_reduce [3, 5], number 1, begun" in reports["0"]
    assert "dist.all_reduce(torch.zeros(3, 5))" in reports["0"]
    assert "time.sleep(60)" in reports["1"]
    assert "no collective yet" in reports["1"]
    assert "does not answer; last heartbeat" in reports["2"]
    assert "run_train train_step for" in reports["2"]
    path = Path(text.rpartition(": ")[2].strip())
    assert "time.sleep(60)" in path.read_text()


def read_reports(text):
    """The workers' reports by rank."""
    reports, rank = {}, ""
    for line in text.splitlines():
        if line.startswith("waiting.r0."):
            rank = line.removeprefix("waiting.r0.")[0]
        reports[rank] = reports.get(rank, "") + line + "\n"
    return reports


def test_a_worker_that_is_stopped_counts_as_dead_within_the_limit(learn):
    start_s = time.monotonic()
    with pytest.raises(WorkerError, match="the worker process died") as caught:
        learn(engine_of(Stopped("stopped")), {"stopped": {"num_gpu": 2}}, heartbeat_timeout_s=3)
    assert caught.value.rank == 1
    assert time.monotonic() - start_s < 30
