"""A pool of processes that form gloo worlds of any size up to its own, one after another.

Megatron is imported once per process; each world sets up and takes down its own groups.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import traceback
from datetime import timedelta
from pathlib import Path

_TIMEOUT_S = 120
_MOST_THREADS = 250


class RankPool:
    """Runs `function(rank, *args)` on the first `world_size` processes at once."""

    def __init__(self, size: int, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._context = context
        self._folder = folder
        self._numbers = itertools.count()
        self._ends = [None] * size
        self._processes = [None] * size
        for rank in range(size):
            self._start(rank)

    def _start(self, rank) -> None:
        own, other = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(rank, other), daemon=True)
        process.start()
        self._ends[rank], self._processes[rank] = own, process

    def _replace(self, rank) -> None:
        self._processes[rank].kill()
        self._processes[rank].join(10)
        self._start(rank)

    def _replace_crowded(self, world_size) -> None:
        """Start ranks anew whose dead worlds have left threads, each of which wakes up for ever.

        A model with Megatron's distributed optimizer is never freed; with it stay its groups.
        """
        for rank, process in enumerate(self._processes[:world_size]):
            if len(os.listdir(f"/proc/{process.pid}/task")) > _MOST_THREADS:
                self._replace(rank)

    def run(self, world_size, function, *args):
        """The results by rank; a rank's exception is raised here with its traceback."""
        store = str(self._folder / f"world{next(self._numbers)}")
        for end in self._ends[:world_size]:
            end.send((store, world_size, function, args))
        results, failures = [], []
        for rank, end in enumerate(self._ends[:world_size]):
            try:
                if not end.poll(_TIMEOUT_S):
                    raise TimeoutError(f"rank {rank} of {world_size} does not answer; {failures}")
                is_good, value = end.recv()
            except (EOFError, OSError):  # a TimeoutError is an OSError
                # Late answers would be taken for those to what comes next.
                for each in range(world_size):
                    self._replace(each)
                raise
            (results if is_good else failures).append(value)
        self._replace_crowded(world_size)
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(10)


def _serve(rank, end) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            store, world_size, function, args = end.recv()
        except EOFError:
            return
        try:
            end.send((True, _run_in_world(store, rank, world_size, function, args)))
        except BaseException:  # noqa: BLE001 - handed to the test
            end.send((False, f"rank {rank}:\n{traceback.format_exc()}"))


def _run_in_world(path, rank, world_size, function, args):
    import torch.distributed as dist

    store = dist.FileStore(path, world_size)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    try:
        return function(rank, *args)
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        _let_go()


def _let_go() -> None:
    """Free the models: they hold their groups, and each group has threads that wake up.

    Megatron's gradient hooks close cycles through autograd's nodes, which the collector cannot see.
    """
    from megatron.core.distributed import DistributedDataParallel

    for found in [o for o in gc.get_objects() if type(o) is DistributedDataParallel]:
        found.grad_accs.clear()
    gc.collect()
