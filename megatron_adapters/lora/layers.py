# pyright: standard, reportPrivateImportUsage=false
"""Megatron's linear layers with low-rank adapters beside their frozen weights.

A fused layer (query, key and value; gate and up) has an adapter for each of its parts, as PEFT has,
so that any adapter of PEFT can be held. Only vectors of the rank's length go between ranks.

Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.nn import functional

__all__ = ["Adapter", "AdapterOptions", "LoraColumn", "LoraRow", "Target"]


@dataclass(frozen=True)
class AdapterOptions:
    """What all adapters of a model share.

    Attributes:
        rank: length of the vectors between A and B.
        scale: factor of B A.
        dropout: of an adapter's input.
    """

    rank: int
    scale: float
    dropout: float


@dataclass(frozen=True)
class Target:
    """A part of a fused layer that has an adapter.

    Attributes:
        name: PEFT's, such as `q_proj`.
        rows: of the layer's weight that belong to it, on this rank, as (start, stop) in order.
    """

    name: str
    rows: tuple[tuple[int, int], ...]

    @property
    def num_rows(self) -> int:
        """How many rows these are."""
        return sum(stop - start for start, stop in self.rows)


class Adapter(nn.Module):
    """A and B of one target, this rank's share.

    Args:
        target: which part of the layer.
        num_in: columns of A.
        num_out: rows of B.
        options: of all adapters.
        dtype: of the parameters.
        device: where they live.
    """

    def __init__(
        self,
        target: Target,
        num_in: int,
        num_out: int,
        options: AdapterOptions,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.target = target
        self.lora_A = nn.Parameter(torch.zeros(options.rank, num_in, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.zeros(num_out, options.rank, dtype=dtype, device=device))

    def delta(self) -> torch.Tensor:
        """[rows, columns] float32 of B A, this rank's share, without the scale."""
        return self.lora_B.float() @ self.lora_A.float()


class _LoraLinear(nn.Module):
    """What both kinds of layer share; mixed into Megatron's classes."""

    adapters: nn.ModuleDict
    lora: AdapterOptions
    is_expert: bool
    config: Any
    weight: Any
    tp_group: Any

    def build_adapters(
        self, lora: AdapterOptions, targets: Sequence[Target], *, is_column: bool
    ) -> None:
        """Make the adapters, and freeze the weight."""
        self.lora = lora
        weight = self.weight
        self.adapters = nn.ModuleDict()
        for target in targets:
            num_out = target.num_rows if is_column else weight.shape[0]
            self.adapters[target.name] = Adapter(
                target, weight.shape[1], num_out, lora, dtype=weight.dtype, device=weight.device
            )
        for adapter in self.each_adapter():
            self._mark(adapter, is_column=is_column)
        for parameter in (weight, getattr(self, "bias", None)):
            if parameter is not None:
                parameter.requires_grad_(requires_grad=False)

    def each_adapter(self) -> list[Adapter]:
        """The adapters, typed."""
        return [cast(Adapter, adapter) for adapter in self.adapters.values()]

    def _mark(self, adapter: nn.Module, *, is_column: bool) -> None:
        """Tell Megatron which gradients to sum over which ranks."""
        first: Any = adapter.lora_A
        second: Any = adapter.lora_B
        cut, whole = (second, first) if is_column else (first, second)
        set_tensor_model_parallel_attributes(cut, True, 0 if is_column else 1, 1)
        for parameter in (first, second):
            parameter.allreduce = not (self.is_expert and self._is_expert_parallel)
        # It sees this rank's share of the sequence only.
        whole.sequence_parallel = self._is_sequence_parallel

    @property
    def _is_expert_parallel(self) -> bool:
        return self.config.expert_model_parallel_size > 1

    @property
    def _is_sequence_parallel(self) -> bool:
        return bool(self.config.sequence_parallel) and not self.is_expert

    @property
    def _is_cut(self) -> bool:
        """Experts are whole on a rank; see `find_lora_problems`."""
        return not self.is_expert and self.tp_group.size() > 1

    def drop(self, hidden: torch.Tensor, *, differs: bool) -> torch.Tensor:
        """Dropout; tensor-parallel ranks draw alike where they hold the same numbers."""
        if not self.training or self.lora.dropout == 0.0:
            return hidden
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if differs and self._is_cut else nullcontext():
            return functional.dropout(hidden, self.lora.dropout)

    @torch.no_grad()
    def merge_into(self, merged: torch.Tensor) -> None:
        """Write W + scale * B A into a tensor like the weight, which stays as it is."""
        merged.copy_(self.weight)
        for adapter in self.each_adapter():
            delta = adapter.delta() * self.lora.scale
            at = 0
            for start, stop in adapter.target.rows:
                part = merged[start:stop]
                part.copy_(self.weight[start:stop].float() + delta[at : at + stop - start])
                at += stop - start


class LoraColumn(_LoraLinear, ColumnParallelLinear):
    """A column-parallel layer: each A is whole on every rank, each B cut with the outputs.

    Args:
        lora: of all adapters.
        targets: made from the number of rows on this rank.
    """

    def __init__(self, *arguments: Any, lora: AdapterOptions, targets: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.build_adapters(lora, targets(self.weight.shape[0]), is_column=True)

    def forward(self, input_: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """See Megatron's layer."""
        output, bias = super().forward(input_, *arguments, **options)
        if len(self.adapters):
            output = output + self._adapt(input_)
        return output, bias

    def _adapt(self, hidden: torch.Tensor) -> torch.Tensor:
        """What all adapters add, in the order of the layer's rows."""
        parts: dict[int, torch.Tensor] = {}
        for adapter in self.each_adapter():
            # PEFT drops anew for each target.
            dropped = self.drop(hidden, differs=self._is_sequence_parallel)
            small = functional.linear(dropped, adapter.lora_A)
            if self._is_sequence_parallel and self._is_cut:
                small = gather_from_sequence_parallel_region(small, group=self.tp_group)
            elif self._is_cut:
                small = copy_to_tensor_model_parallel_region(small, group=self.tp_group)
            change = functional.linear(small, adapter.lora_B) * self.lora.scale
            rows = adapter.target.rows
            pieces = change.split([stop - start for start, stop in rows], dim=-1)
            parts.update((start, piece) for (start, _), piece in zip(rows, pieces, strict=True))
        return self._join(parts)

    def _join(self, parts: dict[int, torch.Tensor]) -> torch.Tensor:
        """All rows' changes; rows without an adapter change by nothing."""
        total, at = self.weight.shape[0], 0
        some = next(iter(parts.values()))
        joined: list[torch.Tensor] = []
        for start in sorted(parts):
            if start > at:
                joined.append(some.new_zeros((*some.shape[:-1], start - at)))
            joined.append(parts[start])
            at = start + parts[start].shape[-1]
        if at < total:
            joined.append(some.new_zeros((*some.shape[:-1], total - at)))
        return torch.cat(joined, dim=-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Megatron's, with the adapters."""
        axes = {f"adapters.{name}.lora_B": 0 for name in self.adapters}
        return _shard(self, prefix, {"weight": 0, "bias": 0, **axes}, sharded_offsets, metadata)


class LoraRow(_LoraLinear, RowParallelLinear):
    """A row-parallel layer: A is cut with the inputs, B whole on every rank.

    Args:
        lora: of all adapters.
        targets: made from the number of rows.
    """

    def __init__(self, *arguments: Any, lora: AdapterOptions, targets: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.build_adapters(lora, targets(self.weight.shape[0]), is_column=False)

    def forward(self, input_: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        """See Megatron's layer."""
        output, bias = super().forward(input_, *arguments, **options)
        for adapter in self.each_adapter():
            small = functional.linear(self.drop(input_, differs=True), adapter.lora_A)
            if self._is_sequence_parallel and self._is_cut:
                small = reduce_scatter_to_sequence_parallel_region(small, group=self.tp_group)
            elif self._is_cut:
                small = reduce_from_tensor_model_parallel_region(small, group=self.tp_group)
            output = output + functional.linear(small, adapter.lora_B) * self.lora.scale
        return output, bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> Any:
        """Megatron's, with the adapters."""
        axes = {f"adapters.{name}.lora_A": 1 for name in self.adapters}
        return _shard(self, prefix, {"weight": 1, **axes}, sharded_offsets, metadata)


def _shard(
    layer: Any, prefix: str, axes: dict[str, int], sharded_offsets: Any, metadata: Any
) -> Any:
    return make_sharded_tensors_for_checkpoint(
        layer.state_dict(prefix="", keep_vars=True),
        prefix,
        axes,
        sharded_offsets,
        tp_group=layer.tp_group,
        dp_cp_group=metadata["dp_cp_group"],
    )


def initial_bound(num_in: int) -> float:
    """A starts uniform within this bound, as PEFT's (Kaiming with a = sqrt(5))."""
    return 1.0 / math.sqrt(num_in)
