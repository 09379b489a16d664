"""What a weight sync says and leaves behind when a rank dies or stands still in its midst.

A description that goes wrong on the way is a case of every transport's contract suite.
"""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
import sync_cases as cases
import torch

from chatlearn.errors import WaitTimeoutError, WorkerError
from chatlearn.runtime.ray_backend import RayBackend

SYNC_TIMEOUT_S = 3.0
SLACK_S = 3.0
TRANSPORTS = {"shared_memory": "auto", "channel": "collective"}
# Two models that share a GPU.
ON_GPU = "cuda_ipc"
# Calls of a sync that see a rank's tensors before the one in which the fault strikes: with the
# channel, a trainer has made its offer, and others wait for what it sends.
NUM_FREE = {("channel", "trainer"): 1}


@pytest.fixture(scope="module")
def _ray(_ray_head):
    with pytest.MonkeyPatch.context() as patch:
        _ray_head.enter(patch)
        yield


@pytest.fixture(scope="module")
def lasting(_ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    pair = cases.Pair(RayBackend(folder), folder, num_sources=2, num_destinations=2)
    yield pair
    pair.close()


@pytest.fixture
def mortals(_ray, tmp_path):
    """A trainer and a sampler that nobody else needs."""
    pair = cases.Pair(RayBackend(tmp_path), tmp_path, num_sources=1, num_destinations=1)
    yield pair
    pair.close()


@pytest.fixture
def mortals_on_gpu(_ray, tmp_path):
    """The same, on one GPU."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pair = cases.Pair(RayBackend(tmp_path), tmp_path, num_sources=1, num_destinations=1, gpus=1)
    yield pair
    pair.close()


def setting_of(transport):
    """Of the config; the plan takes IPC by itself."""
    return TRANSPORTS.get(transport, "auto")


def strike(pair, folder, transport, victim, index, number):
    """Send a signal to a rank in the midst of the next sync."""
    gate = cases.Gate(folder, NUM_FREE.get((transport, victim), 0))
    pair.call_one(victim, index, cases.set_hook, gate)
    gate.signal_there(pair.processes(victim)[index], number)


def fail_in_time(synchronizer, version):
    """The error of a sync, which must come within its timeout."""
    start_s = time.monotonic()
    with pytest.raises((WorkerError, WaitTimeoutError)) as caught:
        synchronizer.sync(version)
    assert time.monotonic() - start_s < SYNC_TIMEOUT_S + SLACK_S
    return caught.value


def check_served(pair, mode, index=0):
    """The old version survives, or nothing is served: neither is anything in between."""
    if mode == "double":
        assert pair.call_one("sampler", index, cases.serve) == cases.value_of("scalar", 0).item()
        assert pair.call_one("sampler", index, cases.differing, 0) == []
        return
    with pytest.raises(WorkerError, match="SyncError: .*sync trainer -> sampler to version 1"):
        pair.call_one("sampler", index, cases.serve)


@pytest.mark.parametrize(
    ("transport", "victim", "mode"),
    [
        ("shared_memory", "trainer", "in_place"),
        ("shared_memory", "sampler", "double"),
        ("channel", "trainer", "double"),
        ("channel", "sampler", "in_place"),
        pytest.param("shared_memory", "trainer", "double", marks=pytest.mark.long),
        pytest.param("shared_memory", "sampler", "in_place", marks=pytest.mark.long),
        pytest.param("channel", "trainer", "in_place", marks=pytest.mark.long),
        pytest.param("channel", "sampler", "double", marks=pytest.mark.long),
        pytest.param(ON_GPU, "trainer", "in_place", marks=pytest.mark.gpu),
        pytest.param(ON_GPU, "trainer", "double", marks=pytest.mark.gpu),
    ],
)
def test_a_rank_that_stops_is_named_and_may_come_back(request, tmp_path, transport, victim, mode):
    pair = request.getfixturevalue("mortals_on_gpu" if transport == ON_GPU else "lasting")
    last = len(pair.groups["sampler"]) - 1
    for name in pair.groups:
        pair.call(name, cases.blank)
    synchronizer = pair.prepare(SYNC_TIMEOUT_S, mode=mode, transport=setting_of(transport))
    pair.call("trainer", cases.write, 0)
    synchronizer.sync(0)
    pair.call("trainer", cases.write, 1)
    strike(pair, tmp_path, transport, victim, last, signal.SIGSTOP)
    try:
        told = str(fail_in_time(synchronizer, 1)).partition("\nworker traceback")[0]
        check_served(pair, mode)
    finally:
        os.kill(pair.processes(victim)[last], signal.SIGCONT)
    assert (f"trainer.r0.{last}" if victim == "trainer" else f"sampler.r{last}.0") in told
    assert any(name in told for name in cases.KINDS)
    check_served(pair, mode, index=last)
    pair.call("trainer", cases.write, 2)
    assert synchronizer.sync(2).num_bytes == synchronizer.plan.num_bytes
    assert not any(pair.differing(2))
    served = pair.call("sampler", cases.serve)
    assert served == [cases.value_of("scalar", 2).item()] * (last + 1)


def test_who_stops_late_in_a_sync_is_named_alone(lasting, tmp_path):
    """Messages that begin late end in time all the same: who waits in vain is not late."""
    pair = lasting
    for name in pair.groups:
        pair.call(name, cases.blank)
    pair.call("trainer", cases.write, 0)
    synchronizer = pair.prepare(SYNC_TIMEOUT_S, transport="collective")
    synchronizer.sync(0)
    pair.call_one("trainer", 0, cases.set_hook, cases.Pause(0.5 * SYNC_TIMEOUT_S))
    strike(pair, tmp_path, "channel", "trainer", 1, signal.SIGSTOP)
    try:
        told = str(fail_in_time(synchronizer, 1))
    finally:
        os.kill(pair.processes("trainer")[1], signal.SIGCONT)
    late, _, waiting = told.partition("did not exchange weights: ")[2].partition("; ")
    assert late.startswith("trainer.r0.1 (others await ")
    assert "sampler" not in late
    assert waiting.startswith("sampler.r")
    assert "from trainer.r0.1 within" in waiting
    synchronizer.sync(2)
    assert not any(pair.differing(0))


@pytest.mark.long
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("victim", ["trainer", "sampler"])
def test_syncs_fail_as_long_as_a_rank_stays_away(lasting, tmp_path, transport, victim):
    pair = lasting
    for name in pair.groups:
        pair.call(name, cases.blank)
    synchronizer = pair.prepare(SYNC_TIMEOUT_S, transport=TRANSPORTS[transport])
    strike(pair, tmp_path, transport, victim, 1, signal.SIGSTOP)
    try:
        for version in range(3):
            told = str(fail_in_time(synchronizer, version))
            assert ("trainer.r0.1" if victim == "trainer" else "sampler.r1.0") in told
    finally:
        os.kill(pair.processes(victim)[1], signal.SIGCONT)
    pair.call("trainer", cases.write, 3)
    synchronizer.sync(3)
    assert not any(pair.differing(3))


@pytest.mark.parametrize(
    ("transport", "victim", "mode"),
    [
        ("shared_memory", "trainer", "double"),
        ("shared_memory", "sampler", "in_place"),
        ("channel", "trainer", "in_place"),
        ("channel", "sampler", "double"),
        pytest.param(ON_GPU, "trainer", "double", marks=pytest.mark.gpu),
        pytest.param(ON_GPU, "sampler", "in_place", marks=pytest.mark.gpu),
    ],
)
def test_a_rank_that_dies_is_named_and_leaves_nothing(request, tmp_path, transport, victim, mode):
    pair = request.getfixturevalue("mortals_on_gpu" if transport == ON_GPU else "mortals")
    numbers = [number for name in pair.groups for number in pair.processes(name)]
    synchronizer = pair.prepare(SYNC_TIMEOUT_S, mode=mode, transport=setting_of(transport))
    pair.call("trainer", cases.write, 0)
    synchronizer.sync(0)
    pair.call("trainer", cases.write, 1)
    strike(pair, tmp_path, transport, victim, 0, signal.SIGKILL)
    error = fail_in_time(synchronizer, 1)
    assert error.is_death
    assert (error.model_name, error.replica, error.rank) == (victim, 0, 0)
    if victim == "trainer":
        check_served(pair, mode)
    workers = [psutil.Process(number) for number in numbers if psutil.pid_exists(number)]
    pair.close()
    _, alive = psutil.wait_procs(workers, 10)
    assert alive == []
    if (transport, victim) != (ON_GPU, "trainer"):
        # A source that is killed on a GPU leaves torch's file of counters.
        assert cases.shared_files(numbers) == []
