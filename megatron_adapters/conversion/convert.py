"""From one format to another, a layer at a time, and back again to see that nothing changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.conversion.megatron_files import write_weights
from megatron_adapters.conversion.sources import (
    ModelSource,
    describe_parts,
    make_tensors,
    open_source,
)
from megatron_adapters.weights.export import MAX_FILE_BYTES, plan_export
from megatron_adapters.weights.folder_writer import (
    FolderWriter,
    begin_folder,
    discard_folder,
    finish_folder,
)
from megatron_adapters.weights.model_file import ModelRecord, write_model_file

__all__ = ["ConversionOptions", "convert", "verify"]

OnBytes = Callable[[int, int], None]


@dataclass(frozen=True)
class ConversionOptions:
    """How to convert.

    Attributes:
        to: `hf`, `megatron` or `peft`.
        family: of the Hugging Face folder to write; None: the source's.
        like: a Hugging Face folder of the same model, for checkpoints that say nothing of it.
        tokenizer: folder or file of the tokenizer to put beside the weights; None: the source's.
        dtype: of the weights, torch's name; None: the source's.
        max_file_bytes: of a file of a Hugging Face folder.
        on_bytes: told the bytes that are done and those there are; None: nobody is.
    """

    to: str
    family: str | None = None
    like: Path | None = None
    tokenizer: Path | None = None
    dtype: str | None = None
    max_file_bytes: int = MAX_FILE_BYTES
    on_bytes: OnBytes | None = None


def convert(source_folder: Path, target: Path, options: ConversionOptions) -> None:
    """Convert a model; the target is there as a whole or not at all.

    Host memory holds a layer at a time; towards Megatron's format the rest is in files beside the
    target, which are removed at the end.

    Args:
        source_folder: a Hugging Face folder or a model's folder in a Megatron checkpoint.
        target: the folder to write; must not exist, or be empty.
        options: how.

    Raises:
        ConfigError: the model has no counterpart in the other format.
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    source = open_source(source_folder, options.like)
    writers = {"hf": _to_huggingface, "megatron": _to_megatron, "peft": _to_peft}
    if options.to not in writers:
        raise ConfigError(f"--to: got {options.to!r}, expected {' or '.join(writers)}")
    writers[options.to](source, target, options)


def verify(source_folder: Path, target: Path, options: ConversionOptions) -> int:
    """Read both folders and compare every element; gives the number of tensors.

    Values are compared after the one rounding that `dtype` asks for.

    Raises:
        CheckpointError: names the first tensors that differ.
    """
    source = open_source(source_folder, options.like)
    if options.to == "peft":
        raise ConfigError("--verify compares whole models, not adapters: leave it out")
    written = open_source(target, options.like if options.to == "megatron" else None)
    count, different = 0, list[str]()
    for part in describe_parts(source.model):
        one, other = make_tensors(part), make_tensors(part)
        source.read(part, one)
        written.read(part, other)
        for name, tensor in one.items():
            count += 1
            expected = tensor
            if options.dtype is not None:
                expected = tensor.to(getattr(torch, options.dtype)).to(tensor.dtype)
            if not torch.equal(_bits(expected), _bits(other[name])):
                different.append(name)
    if different:
        raise CheckpointError(
            f"{target} differs from {source_folder} in {len(different)} of {count} tensors: "
            f"{', '.join(different[:5])}"
        )
    return count


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _to_huggingface(source: ModelSource, target: Path, options: ConversionOptions) -> None:
    model = source.model
    export = plan_export(
        {**model.fields, "bf16": model.dtype == "bfloat16"},
        head=model.head,
        family=options.family or model.family,
        template=model.template,
        dtype=options.dtype or (model.dtype if model.template is None else None),
        max_file_bytes=options.max_file_bytes,
    )
    draft = begin_folder(target, export.plan)
    progress = _Progress(options, sum(place.num_bytes for place in export.plan.places.values()))
    try:
        with FolderWriter(draft, export.plan, progress.add) as writer:
            for part in describe_parts(model):
                tensors = make_tensors(part)
                source.read(part, tensors)
                for shard in export.rename(part):
                    writer.write(shard, tensors[shard.local_name][shard.local_slices()])
        finish_folder(
            draft, target, export.plan, export.config, options.tokenizer or model.tokenizer
        )
    except BaseException:
        discard_folder(draft)
        raise


def _to_peft(source: ModelSource, target: Path, options: ConversionOptions) -> None:
    del options
    if source.adapters is None:
        raise ConfigError(
            "the source holds no low-rank adapters: --to peft is for checkpoints of a run with lora"
        )
    source.adapters.write(target)


def _to_megatron(source: ModelSource, target: Path, options: ConversionOptions) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already: name another folder, or remove it")
    draft = target.with_name(f".{target.name}.partial")
    scratch = target.with_name(f".{target.name}.scratch")
    try:
        for folder in (draft, scratch):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _write_checkpoint(source, draft, scratch, options)
        if target.exists():
            target.rmdir()
        os.replace(draft, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(draft, ignore_errors=True)


def _write_checkpoint(
    source: ModelSource, draft: Path, scratch: Path, options: ConversionOptions
) -> None:
    model = source.model
    dtype = options.dtype or model.dtype
    fields = {**model.fields, "bf16": dtype == "bfloat16"}
    described = describe_parts(replace(model, fields=fields, dtype=dtype))
    # Local names repeat from part to part: each layer is a stage of its own.
    parts = [_prefixed(part, f"{number}/") for number, part in enumerate(described)]
    shards = [shard for part in parts for shard in part]
    progress = _Progress(options, sum(_bytes(shard) for shard in shards))
    tensors = make_tensors(shards, scratch)
    for part in parts:
        source.read(part, tensors)
        progress.add(sum(_bytes(shard) for shard in part))
    write_weights(draft, shards, tensors)
    pretrained = None if model.template is None else str(model.template.resolve())
    write_model_file(draft, ModelRecord(fields, model.head, model.family, pretrained))


def _prefixed(part: Sequence[TensorShard], prefix: str) -> list[TensorShard]:
    return [replace(shard, local_name=prefix + shard.local_name) for shard in part]


def _bytes(shard: TensorShard) -> int:
    return shard.box.num_elements * getattr(torch, shard.dtype).itemsize


class _Progress:
    """Adds up bytes for whoever shows them."""

    def __init__(self, options: ConversionOptions, total: int) -> None:
        self._on_bytes = options.on_bytes
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._on_bytes is not None:
            self._on_bytes(self._done, self._total)
