"""Tensors of one process read by another on the same CUDA device; skipped where there is none."""

import multiprocessing
import time

import pytest
import torch

from chatlearn.sync.shared_memory import OpenedTensors, SharedTensors

pytestmark = pytest.mark.gpu
ELEMENTS = 1 << 28


def median_s(action):
    seconds = []
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[3]


def read(handles, end):
    device = torch.device("cuda", 0)
    source = OpenedTensors().open(0, handles, device)["weight"]
    taken, own = torch.empty_like(source), torch.ones_like(source)
    pull_s = median_s(lambda: taken.copy_(source))
    copy_s = median_s(lambda: taken.copy_(own))
    taken.copy_(source)
    end.send((float(taken.float().sum()), pull_s, copy_s))


def test_a_pull_over_ipc_runs_at_the_speed_of_a_copy_on_the_device(cuda_world):
    weight = torch.full((ELEMENTS,), 2.0, dtype=torch.bfloat16, device=cuda_world)
    shared = SharedTensors()
    handles = shared.share({"weight": weight}, reserved_bytes=0, timeout_s=10)
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=read, args=(handles, other), daemon=True)
    process.start()
    assert own.poll(120), "the reader does not answer"
    total, pull_s, copy_s = own.recv()
    process.join(30)
    assert total == 2.0 * ELEMENTS
    print(
        f"IPC {2 * ELEMENTS / pull_s / 1e9:.0f} GB/s, copy {2 * ELEMENTS / copy_s / 1e9:.0f} GB/s"
    )
    assert copy_s / pull_s > 0.9
