"""Reads a Hugging Face folder's weights into the live model; each rank reads its own slices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chatlearn.errors import CheckpointError
from chatlearn.parallel.renaming import Renaming
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.weights.architecture import Head
from megatron_adapters.weights.config_file import ModelConfigFile, read_config_file
from megatron_adapters.weights.families import find_family
from megatron_adapters.weights.huggingface import huggingface_renaming
from megatron_adapters.weights.pretrained_fields import head_of
from megatron_adapters.weights.safetensors_folder import SafetensorsFolder

__all__ = ["load_shards", "open_pretrained"]

# What older versions of transformers saved though it is computed.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|attn\.bias$")
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_HEADS = ("lm_head.weight", "score.weight")


def load_shards(
    folder: str | Path,
    shards: Sequence[TensorShard],
    tensors: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any],
    *,
    head: Head,
    use_te: bool = False,
) -> None:
    """Fill local tensors with what a folder holds of their shards.

    A scalar head that the folder lacks stays as it is. Values are rounded once where the dtypes
    differ. The order is that of the files, so that a disk reads forward.

    Args:
        folder: in Hugging Face's format.
        shards: of this rank, in Megatron's naming, without the vocabulary's padding.
        tensors: by the shards' local names; written in place.
        fields: the flat Megatron fields of the model.
        head: of the model.
        use_te: the layers are Transformer Engine's modules.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing, unknown or of another shape.
        ConfigError: config.json describes another kind of model.
    """
    config = read_config_file(folder)
    renaming = huggingface_renaming(
        fields, head=head, use_te=use_te, naming=find_family(config).naming
    )
    with open_pretrained(folder, config, renaming, head) as files:
        present = frozenset(files.names)
        wanted = [shard for shard in renaming.apply(shards) if shard.key in present]
        wanted.sort(key=lambda shard: (files.file_of(shard.key), shard.key, shard.box.offset))
        with torch.no_grad():
            for shard in wanted:
                region = tensors[shard.local_name][shard.local_slices()]
                region.copy_(files.read(shard.key, shard.box).view(region.shape))


def open_pretrained(
    folder: str | Path, config: ModelConfigFile, renaming: Renaming, head: Head
) -> SafetensorsFolder:
    """Open a folder's weights, once it is sure that they are those of the model.

    Args:
        folder: in Hugging Face's format.
        config: its config.json.
        renaming: to the names of its files.
        head: of the model that reads them.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing, unknown or of another shape;
            names them and their files.
    """
    shapes = {piece.new.key: piece.new.global_shape for piece in renaming.pieces}
    files = SafetensorsFolder(folder)
    try:
        problems = list(_find_problems(files, config, shapes, head))
    except BaseException:
        files.close()
        raise
    if problems:
        files.close()
        most = problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])
        lines = "\n  ".join(most)
        raise CheckpointError(
            f"the weights in {folder} are not those of the model in {config.path.name}:\n  {lines}"
        )
    return files


def _find_problems(
    files: SafetensorsFolder,
    config: ModelConfigFile,
    shapes: Mapping[str, tuple[int, ...]],
    head: Head,
) -> Iterator[str]:
    names = frozenset(files.names)
    optional = {"score.weight"} if head == "scalar" and head_of(config) == "lm" else set[str]()
    for name in sorted(shapes.keys() - names - optional):
        yield f"{name} {shapes[name]} is missing"
    num_layers = int(config.need("num_hidden_layers"))
    for name in sorted(names - shapes.keys()):
        if not _is_ignored(name, num_layers):
            file = files.file_of(name).name
            yield f"{name} {files.shape_of(name)} in {file} belongs to no part of the model"
    for name in sorted(names & shapes.keys()):
        if files.shape_of(name) != shapes[name]:
            file = files.file_of(name).name
            yield f"{name} in {file} has the shape {files.shape_of(name)}, expected {shapes[name]}"


def _is_ignored(name: str, num_layers: int) -> bool:
    """Buffers, the other kind of head, and layers that predict further tokens."""
    if name in _HEADS or _COMPUTED.search(name):
        return True
    layer = _LAYER.match(name)
    return layer is not None and int(layer[1]) >= num_layers
