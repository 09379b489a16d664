"""The two formats that hold whole models, behind one contract: give me these shards."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from chatlearn.config.schema import LoraConfig
from chatlearn.data.tokenizer import find_tokenizer
from chatlearn.errors import CheckpointError, in_one_line
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.checkpointing import has_checkpoint
from megatron_adapters.conversion.megatron_files import MegatronReader
from megatron_adapters.conversion.saved_adapters import SavedAdapters
from megatron_adapters.weights.architecture import Head
from megatron_adapters.weights.config_file import CONFIG_FILE, read_config_file
from megatron_adapters.weights.description import describe_layout
from megatron_adapters.weights.families import find_family
from megatron_adapters.weights.model_file import read_model_file
from megatron_adapters.weights.pretrained import load_shards
from megatron_adapters.weights.pretrained_fields import head_of

__all__ = ["ModelSource", "SourceModel", "describe_parts", "make_tensors", "open_source"]


@dataclass(frozen=True)
class SourceModel:
    """What a source says of its model.

    Attributes:
        fields: the flat Megatron fields.
        head: of the model.
        family: of Hugging Face folders; None: not known.
        template: Hugging Face folder that the model is or came from; None: there is none.
        tokenizer: folder or file of its tokenizer; None: there is none.
        dtype: of its weights, torch's name.
    """

    fields: Mapping[str, Any]
    head: Head
    family: str | None
    template: Path | None
    tokenizer: Path | None
    dtype: str


class ModelSource(Protocol):
    """A folder that holds a whole model."""

    @property
    def model(self) -> SourceModel:
        """What it is."""
        ...

    @property
    def adapters(self) -> SavedAdapters | None:
        """Low-rank adapters beside its weights, which `read` merges; None: there are none."""
        ...

    def read(self, shards: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill the local tensors of some shards."""
        ...


def open_source(folder: Path, like: Path | None = None) -> ModelSource:
    """A Hugging Face folder, or a model's folder in a Megatron checkpoint.

    Args:
        folder: what to open.
        like: for a Megatron checkpoint, a Hugging Face folder of the same model, whose config.json
            and tokenizer count.

    Raises:
        ChatLearnError: it is neither, or is damaged.
    """
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is no folder")
    if has_checkpoint(str(folder)):
        return _MegatronSource(folder, like)
    if (folder / CONFIG_FILE).is_file():
        return _HuggingFaceSource(folder)
    raise CheckpointError(
        f"{folder} is neither a Hugging Face folder (no {CONFIG_FILE}) nor a model's folder in a "
        "Megatron checkpoint (no metadata.json), such as "
        "checkpoints/episode_000010/models/policy_trainer"
    )


def describe_parts(model: SourceModel) -> list[tuple[TensorShard, ...]]:
    """The shards of a model in parts of one layer each; nothing occurs twice."""
    fields = {**model.fields, "bf16": model.dtype == "bfloat16", "fp16": False}
    # Where it is missing, what reads the fields says so, and what else is.
    layout = ParallelLayout(pp_size=int(fields.get("num_layers") or 1))
    seen: set[tuple[str, Any]] = set()
    parts: list[tuple[TensorShard, ...]] = []
    for shards in describe_layout(fields, layout, head=model.head):
        part = [shard for shard in shards if (shard.key, shard.box) not in seen]
        seen.update((shard.key, shard.box) for shard in part)
        parts.append(tuple(part))
    return parts


def make_tensors(
    shards: Sequence[TensorShard], folder: Path | None = None
) -> dict[str, torch.Tensor]:
    """Local tensors for shards, by name.

    Args:
        shards: whose.
        folder: keep them in files there, so that they take no memory that cannot be given back;
            None: in memory.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for shard in shards:
        ends = tuple(at + n for at, n in zip(shard.local_offset, shard.local_shape, strict=True))
        known = shapes.get(shard.local_name, ends)
        shapes[shard.local_name] = tuple(map(max, known, ends))
        dtypes[shard.local_name] = _find_dtype(shard)
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(shapes.items()):
        size = torch.Size(shape).numel()
        try:
            if folder is None:
                tensors[name] = torch.empty(shape, dtype=dtypes[name])
                continue
            path = str(folder / f"{number}")
            mapped = torch.from_file(path, shared=True, size=size, dtype=dtypes[name])
        except RuntimeError as error:
            raise CheckpointError(
                f"there is no room for {name} {shape}: {in_one_line(error)}"
            ) from error
        tensors[name] = mapped.view(shape)
    return tensors


def _find_dtype(shard: TensorShard) -> torch.dtype:
    found = getattr(torch, shard.dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{shard.key} has the dtype {shard.dtype!r:.60}, which torch lacks")
    return found


def _read_lora(folder: Path, section: Mapping[str, Any]) -> LoraConfig:
    try:
        return LoraConfig.model_validate(section)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: lora of its model.json cannot be: {in_one_line(error)}"
        ) from error


class _HuggingFaceSource:
    def __init__(self, folder: Path) -> None:
        config = read_config_file(folder)
        family = find_family(config)
        tokenizer = find_tokenizer(folder)
        self._folder = folder
        self.adapters: SavedAdapters | None = None
        self.model = SourceModel(
            family.read_fields(config),
            head_of(config),
            family.name,
            folder,
            None if tokenizer is None else Path(tokenizer),
            config.dtype or "float32",
        )

    def read(self, shards: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]) -> None:
        load_shards(self._folder, shards, tensors, self.model.fields, head=self.model.head)


class _MegatronSource:
    def __init__(self, folder: Path, like: Path | None) -> None:
        self._reader = MegatronReader(folder)
        dtype = self._reader.dtype
        self.adapters: SavedAdapters | None = None
        if like is not None:
            found = _HuggingFaceSource(like).model
            self.model = SourceModel(
                found.fields, found.head, found.family, like, found.tokenizer, dtype
            )
        else:
            record = read_model_file(folder)
            template = None if record.pretrained is None else Path(record.pretrained)
            if template is not None and not os.path.isfile(template / CONFIG_FILE):
                template = None
            tokenizer = None if template is None else find_tokenizer(template)
            self.model = SourceModel(
                record.fields,
                record.head,
                record.family,
                template,
                None if tokenizer is None else Path(tokenizer),
                dtype,
            )
            if record.lora is not None:
                lora = _read_lora(folder, record.lora)
                self.adapters = SavedAdapters(
                    self._reader, lora, record.fields, record.head, record.pretrained
                )
        if self.adapters is None and any(".adapters." in key for key in self._reader.shapes):
            raise CheckpointError(
                f"{folder} holds adapters whose scale is not known: leave --like out, so that its "
                "model.json counts"
            )
        parts = describe_parts(self.model)
        self._reader.check([shard for part in parts for shard in part])

    def read(self, shards: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]) -> None:
        self._reader.read(shards, tensors)
        if self.adapters is not None:
            self.adapters.merge(shards, tensors)
