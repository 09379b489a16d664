"""Where a model's adapters stand, in Megatron's words and in PEFT's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatlearn.parallel.counter_random import counter_uniform, stable_hash
from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.lora.layers import Adapter, LoraColumn, initial_bound
from megatron_adapters.model_building import unwrap

__all__ = ["AdapterPlace", "find_layers", "find_places", "initialize_adapters"]

PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedLayer:
    """A linear layer with adapters.

    Attributes:
        name: of its weight among the model's tensors, `<chunk>.<parameter>`.
        stem: PEFT's name of what the layer is a part of, such as `model.layers.0.self_attn`.
        layer: the module.
    """

    name: str
    stem: str
    layer: Any


@dataclass(frozen=True)
class AdapterPlace:
    """One adapter.

    Attributes:
        stem: PEFT's name of the linear layer, such as `model.layers.0.self_attn.q_proj`.
        adapter: the module.
        is_column: its B is cut over the tensor-parallel ranks, else its A.
        tp_rank: this rank among them.
        tp_size: how many there are.
    """

    stem: str
    adapter: Adapter
    is_column: bool
    tp_rank: int
    tp_size: int

    def shards(self) -> tuple[TensorShard, TensorShard]:
        """A and B in PEFT's naming; local names are those of `tensors`."""
        a_axis, b_axis = (None, 0) if self.is_column else (1, None)
        return (
            self._shard("lora_A", self.adapter.lora_A, a_axis),
            self._shard("lora_B", self.adapter.lora_B, b_axis),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """A and B, detached."""
        return {
            f"{self.stem}.lora_A": self.adapter.lora_A.detach(),
            f"{self.stem}.lora_B": self.adapter.lora_B.detach(),
        }

    def _shard(self, kind: str, tensor: torch.Tensor, axis: int | None) -> TensorShard:
        local = tuple(tensor.shape)
        whole, offset = list(local), [0, 0]
        if axis is not None:
            whole[axis] *= self.tp_size
            offset[axis] = self.tp_rank * local[axis]
        return TensorShard(
            f"{PREFIX}{self.stem}.{kind}.weight",
            tuple(whole),
            Box(tuple(offset), local),
            str(tensor.dtype).removeprefix("torch."),
            f"{self.stem}.{kind}",
            (0, 0),
        )


def find_layers(chunks: Sequence[Any]) -> Iterator[AdaptedLayer]:
    """The adapted linear layers of this rank."""
    for number, chunk in enumerate(chunks):
        for at, layer in enumerate(unwrap(chunk).decoder.layers):
            local = f"{number}.decoder.layers.{at}."
            stem = f"model.layers.{layer.layer_number - 1}."
            for part in _find_in_layer(layer):
                yield AdaptedLayer(f"{local}{part.name}.weight", stem + part.stem, part.layer)


def find_places(chunks: Sequence[Any]) -> list[AdapterPlace]:
    """The adapters of this rank."""
    return [
        AdapterPlace(
            f"{found.stem}.{name}",
            adapter,
            isinstance(found.layer, LoraColumn),
            0 if found.layer.is_expert else found.layer.tp_group.rank(),
            1 if found.layer.is_expert else found.layer.tp_group.size(),
        )
        for found in find_layers(chunks)
        for name, adapter in found.layer.adapters.items()
    ]


def initialize_adapters(chunks: Sequence[Any], seed: int) -> None:
    """Fill every A; B stays zero. The same values in every layout."""
    with torch.no_grad():
        for place in find_places(chunks):
            shard = place.shards()[0]
            rows, columns = (
                torch.arange(start, start + size)
                for start, size in zip(shard.box.offset, shard.box.shape, strict=True)
            )
            draw = counter_uniform(
                seed * 0x1000003 ^ stable_hash(shard.key), rows[:, None], columns[None, :]
            )
            bound = initial_bound(shard.global_shape[1])
            place.adapter.lora_A.copy_((2 * draw - 1) * bound)


def _find_in_layer(layer: Any) -> Iterator[AdaptedLayer]:
    attention = layer.self_attention
    yield AdaptedLayer("self_attention.linear_qkv", "self_attn", attention.linear_qkv)
    yield AdaptedLayer("self_attention.linear_proj", "self_attn", attention.linear_proj)
    mlp = layer.mlp
    if not hasattr(mlp, "experts"):
        yield from _find_in_mlp("mlp.", "mlp", mlp)
        return
    for local, expert in enumerate(mlp.experts.local_experts):
        number = mlp.local_expert_indices[local]
        stem = f"mlp.experts.{number}"
        yield from _find_in_mlp(f"mlp.experts.local_experts.{local}.", stem, expert)
    if mlp.shared_experts is not None:
        yield from _find_in_mlp("mlp.shared_experts.", "mlp.shared_experts", mlp.shared_experts)


def _find_in_mlp(name: str, stem: str, mlp: Any) -> Iterator[AdaptedLayer]:
    yield AdaptedLayer(f"{name}linear_fc1", stem, mlp.linear_fc1)
    yield AdaptedLayer(f"{name}linear_fc2", stem, mlp.linear_fc2)
