"""A live model with adapters: what it shows to weight sync and export, and its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from chatlearn.config.schema import LoraConfig
from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.lora.peft_files import ADAPTER_CONFIG, build_peft_config, open_adapter
from megatron_adapters.lora.places import PREFIX, find_layers, find_places
from megatron_adapters.model_building import unwrap
from megatron_adapters.weights.export import Export, export_shards, gather_from_ranks
from megatron_adapters.weights.folder_plan import plan_files
from megatron_adapters.weights.safetensors_names import ADAPTER_FILE

__all__ = ["AdaptedModel"]

_HEAD = f"{PREFIX}score.weight"


class AdaptedModel:
    """Merged weights in buffers of their own; the base weights are never written.

    Args:
        chunks: of this rank, with adapted layers.
        lora: the config's section.
        base: name or folder of the model that the adapters belong to.
    """

    def __init__(self, chunks: Sequence[Any], lora: LoraConfig, base: str | None) -> None:
        self._lora = lora
        self._base = base
        self._layers = [found for found in find_layers(chunks) if len(found.layer.adapters)]
        self._merged: dict[str, torch.Tensor] = {}
        places = find_places(chunks)
        self._shards = [shard for place in places for shard in place.shards()]
        self._tensors = {name: t for place in places for name, t in place.tensors().items()}
        head = _scalar_head(chunks)
        if head is not None:
            # The head of a value or reward model is trained whole.
            shape = tuple(head.shape)
            dtype = str(head.dtype).removeprefix("torch.")
            self._shards.append(TensorShard(_HEAD, shape, Box((0, 0), shape), dtype, _HEAD, (0, 0)))
            self._tensors[_HEAD] = head

    @property
    def target_names(self) -> frozenset[str]:
        """Names of the weights that have adapters."""
        return frozenset(found.name for found in self._layers)

    def merge(self) -> None:
        """Bring the buffers up to date."""
        for found in self._layers:
            if found.name not in self._merged:
                self._merged[found.name] = torch.empty_like(found.layer.weight.detach())
            found.layer.merge_into(self._merged[found.name])

    def with_merged(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The model's weights with the buffers, as of the last `merge`, in place of targets'."""
        if not self._merged:
            self.merge()
        return {**tensors, **self._merged}

    def save(self, folder: Path) -> None:
        """Write a PEFT adapter; every rank of the replica calls this.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        own = {shard.key: (shard.global_shape, shard.dtype) for shard in self._shards}
        every = {key: kind for part in gather_from_ranks(own) for key, kind in part.items()}
        names = sorted(every)
        plan = plan_files(
            {name: every[name][0] for name in names},
            {name: every[name][1] for name in names},
            1 << 62,
            single_file=ADAPTER_FILE,
        )
        config = build_peft_config(self._lora, self._base, is_classifier=_HEAD in every)
        export_shards(
            folder, Export(config, plan, tuple, ADAPTER_CONFIG), self._shards, self._tensors
        )

    def load(self, folder: str | Path) -> None:
        """Fill the adapters from a PEFT adapter; each rank reads its slices.

        Raises:
            CheckpointError: the folder is damaged, or is of another model.
        """
        optional = {_HEAD}
        with open_adapter(folder, self._shards, optional) as files, torch.no_grad():
            present = frozenset(files.names)
            for shard in self._shards:
                if shard.key in present:
                    self._tensors[shard.local_name].copy_(files.read(shard.key, shard.box))


def _scalar_head(chunks: Sequence[Any]) -> torch.Tensor | None:
    model = unwrap(chunks[-1])
    if not (model.has_scalar_head and model.post_process):
        return None
    return model.output_layer.weight.detach()
