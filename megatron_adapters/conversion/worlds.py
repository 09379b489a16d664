"""Small gloo worlds of processes on this machine, for what must run at a layout. No Ray."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from chatlearn.errors import ChatLearnError
from chatlearn.parallel.sockets import keep_groups_at

__all__ = ["World", "build_module"]

_TIMEOUT_S = 60.0
_HOST = "127.0.0.1"


class World:
    """Processes of one world, which run function after function until it is closed.

    Args:
        size: processes.
        timeout_s: of one function.

    Raises:
        ChatLearnError: by `run`, where a rank fails, dies or does not answer.
    """

    def __init__(self, size: int, *, timeout_s: float = 300.0) -> None:
        self.size = size
        self._timeout_s = timeout_s
        self._folder = tempfile.TemporaryDirectory(prefix="chatlearn-world-")
        context = multiprocessing.get_context("spawn")
        self._ends: list[Any] = []
        self._processes: list[Any] = []
        threads = max(1, (os.cpu_count() or 1) // size)
        for rank in range(size):
            own, other = context.Pipe()
            arguments = (str(Path(self._folder.name) / "store"), rank, size, threads, other)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._ends.append(own)
            self._processes.append(process)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """The results of `function(*arguments)` by rank."""
        for end in self._ends:
            end.send((function, arguments))
        results, failures = list[Any](), list[str]()
        for rank, end in enumerate(self._ends):
            try:
                if not end.poll(self._timeout_s):
                    raise ChatLearnError(
                        f"rank {rank} of {self.size} does not answer within {self._timeout_s:g} s"
                        + "".join(failures)
                    )
                is_good, value = end.recv()
            except EOFError:
                is_good, value = False, "the process died"
            if is_good:
                results.append(value)
            else:
                failures.append(f"\nrank {rank}: {value}")
        if failures:
            raise ChatLearnError("".join(failures).strip())
        return results

    def close(self) -> None:
        """End the processes: by themselves, or else by force."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.terminate()
                process.join(10)
        self._folder.cleanup()


def build_module(kind: type, name: str, fields: Mapping[str, Any], *, seed: int = 0) -> Any:
    """A module of this rank, set up as a run does it, in the current world.

    Args:
        kind: a class of `megatron_adapters`.
        name: of the model.
        fields: of its section in a config, such as `pretrained` and the layout.
        seed: `runtime.seed`.
    """
    import torch
    import torch.distributed as dist

    from chatlearn.config import load_config
    from chatlearn.parallel.context import WorkerContext

    config = load_config({"models": {name: dict(fields)}, "runtime": {"seed": seed}})
    module = kind(name)
    completed = module.complete_config(config.model(name)).config
    context = WorkerContext(
        model_name=name,
        module=module,
        replica=0,
        rank=dist.get_rank(),
        layout=_layout_of(fields, dist.get_world_size()),
        device=torch.device("cpu"),
        data_parallel_group=None,
        host=_HOST,
        node_id="this",
        process_id=os.getpid(),
        timeout_s=_TIMEOUT_S,
    )
    module.attach(context, completed, config.runtime, Path("."))
    module.initialize()
    module.setup()
    return module


def _layout_of(fields: Mapping[str, Any], world_size: int) -> Any:
    from chatlearn.parallel.layout import ParallelLayout

    tp = fields.get("tensor_model_parallel_size", 1)
    pp = fields.get("pipeline_model_parallel_size", 1)
    cp = fields.get("context_parallel_size", 1)
    return ParallelLayout(
        tp_size=tp,
        pp_size=pp,
        dp_size=world_size // (tp * pp * cp),
        cp_size=cp,
        ep_size=fields.get("expert_model_parallel_size", 1),
        etp_size=fields.get("expert_tensor_parallel_size"),
    )


def _serve(store_path: str, rank: int, size: int, threads: int, end: Any) -> None:
    import torch

    from megatron_adapters.patches.apply import import_megatron

    torch.set_num_threads(threads)
    # Megatron calls what this torch calls by another name.
    warnings.simplefilter("ignore", FutureWarning)
    import_megatron()
    number = 0
    while True:
        try:
            function, arguments = end.recv()
        except EOFError:
            return
        number += 1
        try:
            end.send((True, _run(f"{store_path}{number}", rank, size, function, arguments)))
        except BaseException:  # noqa: BLE001 - handed to the parent
            end.send((False, traceback.format_exc()))


def _run(path: str, rank: int, size: int, function: Any, arguments: tuple[Any, ...]) -> Any:
    """In a world of its own: each model may have another layout."""
    import torch.distributed as dist

    store = dist.FileStore(path, size)
    keep_groups_at(_HOST)
    timeout = timedelta(seconds=_TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        return function(*arguments)
    finally:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@dataclass(frozen=True)
class LayoutCase:
    """A layout by name.

    Attributes:
        name: as tables show it.
        world_size: ranks.
        fields: of the model's section.
    """

    name: str
    world_size: int
    fields: Mapping[str, Any]
