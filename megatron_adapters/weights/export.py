"""Writes a live model as a Hugging Face folder; every rank writes its own slices, none gathers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.parallel.counter_random import stable_hash
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.weights.architecture import Head
from megatron_adapters.weights.config_file import CONFIG_FILE, read_config_file
from megatron_adapters.weights.families import FAMILIES, Family, find_family
from megatron_adapters.weights.folder_plan import FolderPlan, plan_files
from megatron_adapters.weights.folder_writer import (
    FolderWriter,
    begin_folder,
    discard_folder,
    finish_folder,
)
from megatron_adapters.weights.huggingface import huggingface_renaming
from megatron_adapters.weights.pretrained_fields import check_family
from megatron_adapters.weights.safetensors_folder import SafetensorsFolder

__all__ = ["MAX_FILE_BYTES", "Export", "export_shards", "gather_from_ranks", "plan_export"]

MAX_FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Export:
    """What a folder will hold.

    Attributes:
        config: content of config.json.
        plan: of the files.
        rename: from shards in Megatron's naming to those of the folder.
        config_file: name of the config's file.
    """

    config: Mapping[str, Any]
    plan: FolderPlan
    rename: Callable[[Sequence[TensorShard]], tuple[TensorShard, ...]]
    config_file: str = CONFIG_FILE


def plan_export(
    fields: Mapping[str, Any],
    *,
    head: Head,
    family: str | None,
    template: str | Path | None,
    use_te: bool = False,
    dtype: str | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Export:
    """What a model's folder will hold.

    Args:
        fields: the flat Megatron fields of the model.
        head: of the model.
        family: whose format; None: the template's.
        template: the folder that the model came from, whose config.json and dtypes are kept; None:
            the config.json follows from the fields.
        use_te: the layers are Transformer Engine's modules.
        dtype: of the weights, torch's name; None: the template's, else the model's.
        max_file_bytes: of a file.

    Raises:
        ConfigError: the family is not known or has no such models.
    """
    chosen = _choose_family(family, template)
    written = check_family(chosen, fields, head)
    renaming = huggingface_renaming(fields, head=head, use_te=use_te, naming=chosen.naming)
    shapes = {piece.new.key: piece.new.global_shape for piece in renaming.pieces}
    known: dict[str, str] = {}
    if template is not None:
        source = read_config_file(template)
        written = {
            **source.values,
            "architectures": written["architectures"],
            "dtype": dtype or source.dtype or written["dtype"],
        }
        if head == "scalar":
            written["id2label"], written["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
        if dtype is None:
            known = _dtypes_of(template)
    elif dtype is not None:
        written["dtype"] = dtype
    dtypes = {name: known.get(name, written["dtype"]) for name in shapes}
    return Export(written, plan_files(shapes, dtypes, max_file_bytes), renaming.apply)


def export_shards(
    target: Path,
    export: Export,
    shards: Sequence[TensorShard],
    tensors: Mapping[str, torch.Tensor],
    *,
    tokenizer: Path | None = None,
) -> None:
    """Write a live model; every rank of its world calls this, and it is there when all return.

    Each slice is written by one of the ranks that hold it. All ranks must see one file system.

    Args:
        target: the folder; must not exist, or be empty.
        export: from `plan_export`.
        shards: of this rank, in Megatron's naming.
        tensors: by the shards' local names.
        tokenizer: folder or file of the tokenizer, which goes along; None: there is none.

    Raises:
        CheckpointError: a rank cannot write; nothing is left behind.
    """
    renamed = export.rename(shards)
    own = _choose_own(renamed)
    is_first = _rank() == 0
    draft = _agree(lambda: begin_folder(target, export.plan) if is_first else None)
    try:
        _agree(lambda: _write(draft, export.plan, own, tensors))
    except CheckpointError:
        if is_first:
            discard_folder(draft)
        raise
    _agree(
        lambda: (
            finish_folder(draft, target, export.plan, export.config, tokenizer, export.config_file)
            if is_first
            else None
        )
    )


def _choose_family(family: str | None, template: str | Path | None) -> Family:
    if family is not None:
        if family not in FAMILIES:
            raise ConfigError(f"family: got {family!r}, expected one of {', '.join(FAMILIES)}")
        return FAMILIES[family]
    if template is None:
        raise ConfigError(f"a Hugging Face folder has a family: name one of {', '.join(FAMILIES)}")
    return find_family(read_config_file(template))


def _dtypes_of(template: str | Path) -> dict[str, str]:
    """Of the template's tensors; none where it has no weights (any more)."""
    try:
        with SafetensorsFolder(template) as files:
            return {name: files.dtype_of(name) for name in files.names}
    except CheckpointError:
        return {}


def _write(
    draft: Path, plan: FolderPlan, own: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]
) -> None:
    with FolderWriter(draft, plan) as writer:
        for shard in own:
            writer.write(shard, tensors[shard.local_name][shard.local_slices()])


def _choose_own(shards: Sequence[TensorShard]) -> list[TensorShard]:
    """The slices that this rank writes: those that several hold are spread over them."""
    if _world_size() == 1:
        return list(shards)
    ids = [stable_hash(f"{shard.key} {shard.box}") for shard in shards]
    holders: dict[int, list[int]] = {}
    for rank, held in enumerate(gather_from_ranks(ids)):
        for number in held:
            holders.setdefault(number, []).append(rank)
    rank = _rank()
    return [
        shard
        for number, shard in zip(ids, shards, strict=True)
        if holders[number][number % len(holders[number])] == rank
    ]


def _agree(action: Callable[[], Any]) -> Any:
    """Do something on every rank; gives the first rank's result, or raises on all what failed."""
    try:
        result, error = action(), None
    except (CheckpointError, OSError, RuntimeError) as failure:
        result, error = None, failure
    if _world_size() == 1:
        if error is not None:
            raise error
        return result
    outcomes = gather_from_ranks((result, None if error is None else f"{error}"))
    failures = [f"rank {rank}: {text}" for rank, (_, text) in enumerate(outcomes) if text]
    if failures:
        raise CheckpointError("; ".join(failures)) from error
    return outcomes[0][0]


def gather_from_ranks(value: Any) -> list[Any]:
    """A value of each rank of this world; everything is pickled."""
    if _world_size() == 1:
        return [value]
    found: list[Any] = [None] * _world_size()
    collectives: Any = dist
    collectives.all_gather_object(found, value)
    return found


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
