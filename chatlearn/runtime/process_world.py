# pyright: standard, reportPrivateImportUsage=false
"""Joins this process to the process world of its replica and describes it as a WorkerContext."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from chatlearn.parallel.context import WorkerContext
from chatlearn.parallel.sockets import keep_groups_at
from chatlearn.runtime.freed_memory import keep_freed_memory

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from chatlearn.parallel.layout import ParallelLayout

__all__ = ["WorkerIdentity", "close_world", "join_world"]


@dataclass(frozen=True)
class WorkerIdentity:
    """Which rank of which replica of which model a process is, and on which node.

    `reserved_shm_bytes` is shared memory of the node that is spoken for, by Ray's object store.
    """

    model_name: str
    replica: int
    rank: int
    layout: ParallelLayout
    host: str
    node_id: str
    is_cpu_only: bool
    timeout_s: float
    reserved_shm_bytes: int = 0


def join_world(identity: WorkerIdentity, module: Any, store: Any) -> WorkerContext:
    """Initialise torch.distributed for the replica's world and build the worker's context.

    Args:
        identity: who this process is.
        module: the user's module, living here from now on.
        store: a torch.distributed store that every rank of the replica reaches; unused where a
            default process group exists (the `local` backend, where models share a process).
    """
    import torch
    import torch.distributed as dist

    device = _choose_device(identity)
    keep_freed_memory()
    keep_groups_at(identity.host)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(
            backend,
            store=store,
            rank=identity.rank,
            world_size=identity.layout.world_size,
            timeout=timedelta(seconds=identity.timeout_s),
            device_id=device if device.type == "cuda" else None,
        )
    torch.manual_seed(identity.rank)
    return WorkerContext(
        model_name=identity.model_name,
        module=module,
        replica=identity.replica,
        rank=identity.rank,
        layout=identity.layout,
        device=device,
        data_parallel_group=_build_data_parallel_group(identity),
        host=identity.host,
        node_id=identity.node_id,
        process_id=os.getpid(),
        timeout_s=identity.timeout_s,
        reserved_shm_bytes=identity.reserved_shm_bytes,
    )


def close_world() -> None:
    """Leave the process world, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _choose_device(identity: WorkerIdentity) -> torch.device:
    import torch

    if identity.is_cpu_only or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    return device


def _build_data_parallel_group(identity: WorkerIdentity) -> ProcessGroup | None:
    import torch.distributed as dist

    layout = identity.layout
    if layout.dp_size == 1:
        return None
    own: ProcessGroup | None = None
    # Every rank takes part in making every group, in the same order.
    for ranks in sorted({layout.data_parallel_ranks(rank) for rank in range(layout.world_size)}):
        group: Any = dist.new_group(ranks)
        if identity.rank in ranks:
            own = group
    return own
