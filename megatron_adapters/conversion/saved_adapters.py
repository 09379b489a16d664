"""Low-rank adapters in a Megatron checkpoint: merged into what is read, or written as PEFT's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from chatlearn.config.schema import LoraConfig
from chatlearn.errors import CheckpointError
from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.conversion.megatron_files import MegatronReader
from megatron_adapters.lora.peft_files import ADAPTER_CONFIG, build_peft_config
from megatron_adapters.lora.places import PREFIX
from megatron_adapters.lora.spec import find_targets
from megatron_adapters.weights.architecture import Head
from megatron_adapters.weights.export import Export, export_shards
from megatron_adapters.weights.folder_plan import plan_files
from megatron_adapters.weights.safetensors_names import ADAPTER_FILE

__all__ = ["SavedAdapters"]

_KEY = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?(.+)\.adapters\.([a-z]+_proj)\.(lora_[AB])$")
_STEMS = {"self_attention": "self_attn", "mlp": "mlp", "mlp.shared_experts": "mlp.shared_experts"}
_EXPERTS = "mlp.experts.experts"
_HEAD = "output_layer.weight"


@dataclass(frozen=True)
class _Saved:
    """A or B of one adapter within the checkpoint.

    Attributes:
        key: of the tensor there.
        shape: of the tensor there.
        index: on its leading axes (layer, expert).
        name: PEFT's.
    """

    key: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    name: str

    def shard(self, dtype: str) -> TensorShard:
        """Its description, as a local tensor of its own."""
        local = self.shape[len(self.index) :]
        box = Box((*self.index, 0, 0), (*(1,) * len(self.index), *local))
        return TensorShard(self.key, self.shape, box, dtype, self.name, (0, 0))


class SavedAdapters:
    """The adapters of a checkpoint.

    Args:
        reader: of the checkpoint.
        lora: the section of the config that they were trained with.
        fields: the flat Megatron fields of the model.
        head: of the model.
        base: the folder that the model started from; None: not known.
    """

    def __init__(
        self,
        reader: MegatronReader,
        lora: LoraConfig,
        fields: Mapping[str, Any],
        head: Head,
        base: str | None,
    ) -> None:
        self._reader = reader
        self._lora = lora
        self._fields = fields
        self._head = head
        self._base = base

    def merge(self, shards: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]) -> None:
        """Add scale * B A to the weights of these shards that have adapters.

        Args:
            shards: in Megatron's naming, whole over tensor-parallel ranks.
            tensors: by the shards' local names, filled; written in place.
        """
        divisor = self._lora.rank**0.5 if self._lora.use_rslora else self._lora.rank
        scale = self._lora.alpha / divisor
        seen: set[str] = set()
        for shard in shards:
            if shard.local_name in seen or not shard.key.endswith(".weight"):
                continue
            seen.add(shard.local_name)
            tensor = tensors[shard.local_name]
            lead = shard.box.offset[: len(shard.global_shape) - tensor.dim()]
            for name, rows in find_targets(shard.key, self._fields, tensor.shape[0]).items():
                stem = f"{shard.key.removesuffix('weight')}adapters.{name}."
                if f"{stem}lora_A" not in self._reader.shapes:
                    continue
                delta = (
                    self._read(f"{stem}lora_B", lead) @ self._read(f"{stem}lora_A", lead)
                ) * scale
                at = 0
                for start, stop in rows:
                    part = tensor[start:stop]
                    part.copy_(part.float() + delta[at : at + stop - start])
                    at += stop - start

    def write(self, target: Path) -> None:
        """Write a PEFT adapter.

        Raises:
            CheckpointError: the target is in use or cannot be written.
        """
        saved = sorted(self._find(), key=lambda entry: entry.name)
        dtype = self._reader.dtype
        shards = [entry.shard(dtype) for entry in saved]
        tensors = {
            s.local_name: torch.empty(s.local_shape, dtype=getattr(torch, dtype)) for s in shards
        }
        self._reader.read(shards, tensors)
        named = [
            TensorShard(
                s.local_name, s.local_shape, Box((0, 0), s.local_shape), dtype, s.local_name, (0, 0)
            )
            for s in shards
        ]
        plan = plan_files(
            {shard.key: shard.global_shape for shard in named},
            {shard.key: dtype for shard in named},
            1 << 62,
            single_file=ADAPTER_FILE,
        )
        config = build_peft_config(self._lora, self._base, is_classifier=self._head == "scalar")
        export_shards(target, Export(config, plan, tuple, ADAPTER_CONFIG), named, tensors)

    def _find(self) -> Iterator[_Saved]:
        for key, shape in self._reader.shapes.items():
            if self._head == "scalar" and key == _HEAD:
                yield _Saved(key, shape, (), f"{PREFIX}score.weight")
            found = _KEY.match(key)
            if found is None:
                continue
            layer, path, target, kind = found.groups()
            counts = shape[:-2]
            for number in range(prod(counts)):
                index = tuple(
                    int(i) for i in torch.unravel_index(torch.tensor(number), counts or (1,))
                )
                index = index if counts else ()
                stem = _stem(layer, path, index)
                yield _Saved(key, shape, index, f"{PREFIX}{stem}.{target}.{kind}.weight")

    def _read(self, key: str, lead: tuple[int, ...]) -> torch.Tensor:
        """[rows, columns] float32."""
        saved = _Saved(key, self._reader.shapes[key], lead, key)
        shard = saved.shard("float32")
        tensor = torch.empty(shard.local_shape)
        self._reader.read([shard], {key: tensor})
        return tensor


def _stem(layer: str | None, path: str, index: tuple[int, ...]) -> str:
    """PEFT's name of what a linear layer is a part of."""
    rest = list(index)
    number = layer if layer is not None else str(rest.pop(0))
    parent = path.rpartition(".")[0]
    if parent == _EXPERTS:
        return f"model.layers.{number}.mlp.experts.{rest.pop(0)}"
    if parent not in _STEMS:
        raise CheckpointError(f"adapters of {path}: such a layer has no name in PEFT")
    return f"model.layers.{number}.{_STEMS[parent]}"
