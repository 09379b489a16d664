# pyright: standard, reportPrivateImportUsage=false
"""Writes Megatron's distributed format in two parts: a plan and copies now, files later.

All collectives happen in `plan_save`. What it gives writes this rank's file with no other rank's
help, so it may run on a thread while the model trains; rank 0's part then waits for the others'
results, which come as files beside the data, and writes the metadata that makes it a checkpoint.
"""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatlearn.errors import CheckpointError

__all__ = ["RankSave", "StagingArea", "plan_save"]

_RESULTS = ".results"
_POLL_S = 0.02


@dataclass
class StagingArea:
    """Host memory for copies of what is being saved, kept from save to save.

    Fresh memory is several times slower to fill than memory that has been filled before.
    """

    tensors: dict[Any, torch.Tensor] = field(default_factory=dict)

    def copy(self, key: Any, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory, valid until the next one of this key."""
        known = self.tensors.get(key)
        if known is None or known.shape != tensor.shape or known.dtype != tensor.dtype:
            is_pinned = tensor.device.type == "cuda"
            known = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
            self.tensors[key] = known
        known.copy_(tensor.detach(), non_blocking=True)
        return known


@dataclass
class RankSave:
    """One rank's part of a save.

    Attributes:
        folder: of the checkpoint.
        rank: of this process.
        world_size: ranks that write.
        timeout_s: how long rank 0 waits for the others' results.
        plan: what this rank writes.
        planner: resolves the plan's items.
        metadata: of the whole; on rank 0 only.
    """

    folder: Path
    rank: int
    world_size: int
    timeout_s: float
    plan: Any
    planner: Any
    metadata: Any

    def write(self) -> list[Path]:
        """Write this rank's files, and on rank 0 the metadata; gives what was written.

        Raises:
            CheckpointError: something cannot be written, or another rank's results do not come.
        """
        from torch.distributed.checkpoint import FileSystemWriter

        try:
            # The receipt's checksum reads the file anew and syncs it.
            writer = FileSystemWriter(self.folder, thread_count=1, sync_files=False)
            writer.set_up_storage_writer(self.rank == 0)
            results = writer.write_data(self.plan, self.planner).value()
            written = sorted({self.folder / each.storage_data.relative_path for each in results})
            if self.rank:
                self._tell(results)
                return written
            everyone = [results, *(self._hear(rank) for rank in range(1, self.world_size))]
            writer.finish(self.metadata, everyone)
            self._finish_folder()
            return [*written, self.folder / ".metadata"]
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be written: {error}") from error

    def _finish_folder(self) -> None:
        from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config

        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        for rank in range(1, self.world_size):
            self._results_file(rank).unlink()

    def _results_file(self, rank: int) -> Path:
        return self.folder / f"{_RESULTS}_{rank}.json"

    def _tell(self, results: list[Any]) -> None:
        content = [
            [
                each.index.fqn,
                None if each.index.offset is None else list(each.index.offset),
                each.index.index,
                each.size_in_bytes,
                each.storage_data.relative_path,
                each.storage_data.offset,
                each.storage_data.length,
            ]
            for each in results
        ]
        path = self._results_file(self.rank)
        draft = path.with_suffix(".partial")
        draft.write_text(json.dumps(content), encoding="utf-8")
        os.replace(draft, path)

    def _hear(self, rank: int) -> list[Any]:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.storage import WriteResult

        path = self._results_file(rank)
        deadline = time.monotonic() + self.timeout_s
        while not path.is_file():
            if time.monotonic() > deadline or not self.folder.is_dir():
                raise CheckpointError(f"{self.folder}: rank {rank} did not write its part in time")
            time.sleep(_POLL_S)
        return [
            WriteResult(
                index=MetadataIndex(fqn, None if at is None else torch.Size(at), index),
                size_in_bytes=size,
                storage_data=_StorageInfo(name, offset, length),
            )
            for fqn, at, index, size, name, offset, length in json.loads(path.read_text("utf-8"))
        ]


def plan_save(
    folder: Path,
    content: dict[str, Any],
    *,
    staging: StagingArea | None,
    is_checked: bool,
    timeout_s: float,
) -> RankSave:
    """Plan a save and copy what is saved; every rank of the replica calls it.

    Args:
        folder: of the checkpoint; exists.
        content: a sharded state dict.
        staging: where copies go; None: the live tensors are written, so they must stand still.
        is_checked: let Megatron check that every part of every tensor is saved by one rank.
        timeout_s: how long rank 0 waits for the others' results.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
    from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy

    base: Any = AsyncSaveShardedStrategy
    planned: list[RankSave] = []

    class Planner(base):
        def async_save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> Any:
            planned.append(_plan(Path(checkpoint_dir), sharded_state_dict, timeout_s))
            return AsyncRequest(None, (), [])

        @property
        def can_handle_sharded_objects(self) -> bool:
            return True

    dist_checkpointing.save(
        content,
        str(folder),
        sharded_strategy=Planner("torch_dist", 1),
        validate_access_integrity=is_checked,
        async_sharded_save=True,
    )
    (save,) = planned
    if staging is not None:
        save.planner = _Staged(save.plan, save.planner, staging)
    return save


def _plan(folder: Path, sharded_state_dict: Any, timeout_s: float) -> RankSave:
    """Agree on who writes what; the metadata of the whole stays with rank 0."""
    from dataclasses import replace

    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
    from torch.distributed.checkpoint.filesystem import _StoragePrefix

    flat, mapping, renamed = torch_strategies._replace_state_dict_keys_with_sharded_keys(
        sharded_state_dict, keep_only_main_replica=True
    )
    del mapping, renamed
    state = torch_strategies.mcore_to_pyt_state_dict(flat, is_loading=False)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    planner = torch_strategies.MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner(state, is_coordinator=rank == 0)
    plan = planner.create_local_plan()
    plans: list[Any] | None = [None] * world_size if rank == 0 else None
    if world_size > 1:
        dist.gather_object(plan, plans, dst=0)
    else:
        plans = [plan]
    metadata = None
    if plans is not None:
        _, metadata = planner.create_global_plan(plans)
    plan = replace(plan, storage_data=_StoragePrefix(f"__{rank}_"))
    return RankSave(
        folder, rank, world_size, timeout_s, planner.finish_plan(plan), planner, metadata
    )


class _Staged:
    """Stands in for the planner when files are written: gives the copies.

    Args:
        plan: what will be asked for.
        planner: gives the live values.
        staging: where the copies go.
    """

    def __init__(self, plan: Any, planner: Any, staging: StagingArea) -> None:
        self._values: dict[Any, Any] = {}
        is_cuda = False
        for item in plan.items:
            value = planner.resolve_data(item)
            if isinstance(value, io.BytesIO):
                self._values[item.index] = value
                continue
            is_cuda |= value.device.type == "cuda"
            self._values[item.index] = staging.copy(item.index, value)
        if is_cuda:
            torch.cuda.synchronize()

    def resolve_data(self, item: Any) -> Any:
        """The copy of one item."""
        return self._values[item.index]
