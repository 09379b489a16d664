# pyright: standard, reportPrivateImportUsage=false
"""Reads and writes weights in Megatron's distributed format by boxes, without a live model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from chatlearn.errors import CheckpointError
from chatlearn.parallel.sharding import TensorShard
from chatlearn.parallel.sockets import keep_groups_at
from megatron_adapters.checkpoint_reader import describe_damage, open_reader

__all__ = ["MegatronReader", "write_weights"]

_At = tuple[str, tuple[int, ...]]

_EMBEDDING = "embedding.word_embeddings.weight"
_VOCABULARY = (_EMBEDDING, "output_layer.weight")


class MegatronReader:
    """The tensors of a checkpoint, read by boxes.

    Megatron's own loader wants whole tensors where there is one rank, so this asks torch's reader.

    Args:
        folder: of a model in a checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds no model with an embedding.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reader = open_reader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        if _EMBEDDING not in self._tensors:
            raise CheckpointError(f"{folder} holds no model with an embedding")

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors, the optimizer's among them."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    @property
    def dtype(self) -> str:
        """Of the embedding, torch's name."""
        return str(self._tensors[_EMBEDDING].properties.dtype).removeprefix("torch.")

    def read(self, shards: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill local tensors with what the checkpoint holds of their shards.

        Args:
            shards: in Megatron's naming, without the vocabulary's padding.
            tensors: by the shards' local names; written in place.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        planner = _BoxPlanner(shards, tensors, self._tensors)
        plan = self._reader.prepare_local_plan(LoadPlan(planner.items))
        try:
            self._reader.read_data(plan, planner).wait()
        except Exception as error:  # noqa: BLE001 - damaged files raise anything
            raise CheckpointError(
                f"{self._folder} cannot be read: {describe_damage(error)}"
            ) from error

    def check(self, shards: Sequence[TensorShard]) -> None:
        """Refuse a checkpoint that is of another model.

        Raises:
            CheckpointError: names the tensors that are missing or of another shape.
        """
        problems: list[str] = []
        for shard in {shard.key: shard for shard in shards}.values():
            saved = self._tensors.get(shard.key)
            if saved is None:
                problems.append(f"{shard.key} {shard.global_shape} is missing")
                continue
            shape = tuple(saved.size)
            is_padded = shard.key in _VOCABULARY and shape[1:] == shard.global_shape[1:]
            if shape != shard.global_shape and not (is_padded and shape[0] > shard.global_shape[0]):
                problems.append(f"{shard.key} has the shape {shape}, expected {shard.global_shape}")
        if problems:
            lines = "\n  ".join(problems[:10])
            raise CheckpointError(f"{self._folder} is no checkpoint of this model:\n  {lines}")


class _BoxPlanner(LoadPlanner):
    """Sends what is read to its place in the local tensors."""

    def __init__(
        self,
        shards: Sequence[TensorShard],
        tensors: Mapping[str, torch.Tensor],
        saved: Mapping[str, TensorStorageMetadata],
    ) -> None:
        self._regions: dict[_At, torch.Tensor] = {}
        self.items: list[ReadItem] = []
        for shard in shards:
            region = tensors[shard.local_name][shard.local_slices()]
            self._regions[shard.key, shard.box.offset] = region.view(shard.box.shape)
            chunk = ChunkStorageMetadata(torch.Size(shard.box.offset), torch.Size(shard.box.shape))
            self.items += create_read_items_for_chunk_list(shard.key, saved[shard.key], [chunk])

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """The part of a region that an item fills."""
        index = read_item.dest_index
        offset = tuple(index.offset or ())
        region = self._regions[index.fqn, offset]
        for axis, (at, size) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            region = region.narrow(axis, at, size)
        return region

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """It was written where it belongs."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Objects are no weights."""

    def set_up_planner(self, *_arguments: Any, **_options: Any) -> None:
        """Nothing: the constructor did."""

    def create_local_plan(self) -> LoadPlan:
        """The items."""
        return LoadPlan(self.items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """The same."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """The same."""
        return central_plan


def write_weights(
    folder: Path, shards: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a checkpoint of weights only.

    Args:
        folder: exists and holds no checkpoint.
        shards: of the whole model, in Megatron's naming.
        tensors: by the shards' local names.

    Raises:
        CheckpointError: it cannot be written.
    """
    from megatron.core import dist_checkpointing

    from megatron_adapters.checkpointing import build_strategy

    state: dict[str, Any] = {
        "model": {f"{number}": _entry(shard, tensors) for number, shard in enumerate(shards)},
        "iteration": 0,
    }
    try:
        with _single_world():
            dist_checkpointing.save(state, str(folder), sharded_strategy=build_strategy())
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def _entry(shard: TensorShard, tensors: Mapping[str, torch.Tensor]) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    region = tensors[shard.local_name][shard.local_slices()]
    lead = len(shard.global_shape) - region.dim()
    sizes = shard.box.shape
    return ShardedTensor(
        key=shard.key,
        data=region,
        dtype=region.dtype,
        local_shape=tuple(region.shape),
        global_shape=shard.global_shape,
        global_offset=shard.box.offset,
        axis_fragmentations=tuple(
            whole // part for whole, part in zip(shard.global_shape, sizes, strict=True)
        ),
        prepend_axis_num=lead,
        allow_shape_mismatch=shard.key in _VOCABULARY,
    )


@contextmanager
def _single_world() -> Iterator[None]:
    """Megatron's checkpoints ask for a rank: a world of this process alone."""
    if dist.is_initialized():
        yield
        return
    keep_groups_at("127.0.0.1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
