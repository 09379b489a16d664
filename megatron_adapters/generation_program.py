# pyright: standard, reportPrivateImportUsage=false
"""One pipeline stage's forward pass over packed tokens, for generation.

`DenseProgram` calls torch's functions on the weights of the layers that it knows;
`ModuleProgram` goes through Megatron's modules and so knows every layer. Both hold the parameters
themselves, so what weight sync writes counts from the next `prepare` on, which begins each call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.nn import functional

from megatron_adapters.dense_layers import DenseLayer, DenseLinear, TensorFunction, is_dense
from megatron_adapters.kernels.availability import can_run_kernels
from megatron_adapters.kv_cache import CacheView
from megatron_adapters.packed_products import PackedProducts
from megatron_adapters.rotary import build_doubled_angles

__all__ = ["DenseProgram", "ModuleProgram", "StageProgram", "build_program"]


class StageProgram(Protocol):
    """What the runner needs of a stage; `hidden` is [packed, hidden size]."""

    @property
    def fills_rows(self) -> bool:
        """Whether passes of many different sizes cost more than rows that only fill up.

        All stages of a pipeline have to want it.
        """
        ...

    def prepare(self, num_rows: int) -> None:
        """Look at the weights anew; passes of about so many tokens follow."""
        ...

    def embed(self, view: CacheView) -> torch.Tensor:
        """Hidden states of the pass's tokens; first stage only."""
        ...

    def run_layers(self, hidden: torch.Tensor, view: CacheView) -> torch.Tensor:
        """Through this stage's layers; may write into `hidden`."""
        ...

    def compute_logits(self, hidden: torch.Tensor, view: CacheView) -> torch.Tensor:
        """[wanted, padded vocabulary] of the wanted tokens, on every rank; last stage only."""
        ...


def build_program(model: Any, max_length: int) -> StageProgram:
    """The dense program where it knows every layer, else Megatron's modules.

    Args:
        model: GPTModel of this stage.
        max_length: longest sequence, tokens.
    """
    kind = DenseProgram if is_dense(model) else ModuleProgram
    return kind(model, max_length)


class DenseProgram:
    """Dense decoder layers as plain calls of torch's functions.

    Args:
        model: GPTModel of this stage, see `is_dense`.
        max_length: longest sequence, tokens.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        self._model = model
        self._products = PackedProducts()
        self._layers = [DenseLayer.of(layer) for layer in model.decoder.layers]
        attention = model.decoder.layers[0].self_attention
        self._groups: int = attention.num_query_groups_per_partition
        self._size: int = attention.hidden_size_per_attention_head
        # Of a group.
        self._heads: int = attention.num_attention_heads_per_partition // self._groups
        self._tensor_group = attention.pg_collection.tp
        self._is_split = self._tensor_group.size() > 1
        self._is_gated = bool(model.config.gated_linear_unit)
        self._activation: TensorFunction = model.config.activation_func
        final_norm = getattr(model.decoder, "final_layernorm", None)
        self._final_norm: TensorFunction | None = None if final_norm is None else final_norm.forward
        self._rotary = self._local_rotary = None
        tables = model.build_rotary(max_length, next(model.parameters()).device)
        if tables is not None:
            self._rotary = _Rotary(tables.angles, _dtype(model))
            if tables.local is not None:
                self._local_rotary = _Rotary(tables.local, _dtype(model))

        self._fits_kernels = all(_fits_kernels(layer) for layer in self._layers)

    @property
    def fills_rows(self) -> bool:
        """See `StageProgram.fills_rows`."""
        return self._products.is_packed

    def prepare(self, num_rows: int) -> None:
        """See `StageProgram.prepare`."""
        linears = (
            linear
            for layer in self._layers
            for linear in (layer.qkv, layer.projection, layer.fc1, layer.fc2)
        )
        weights: list[torch.Tensor] = [linear.weight for linear in linears]
        if self._model.post_process:
            weights.append(_output_weight(self._model))
        self._products.prepare(weights, num_rows)

    def embed(self, view: CacheView) -> torch.Tensor:
        """See `StageProgram.embed`."""
        embedding = self._model.embedding
        words = embedding.word_embeddings
        if not self._is_split:
            hidden = functional.embedding(view.token_ids, words.weight)
        else:
            token_ids = view.token_ids - words.vocab_start_index
            is_other = (token_ids < 0) | (token_ids >= words.num_embeddings_per_partition)
            hidden = functional.embedding(token_ids.masked_fill_(is_other, 0), words.weight)
            hidden.masked_fill_(is_other[:, None], 0.0)
            dist.all_reduce(hidden, group=self._tensor_group)
        if self._model.embedding_scale is not None:
            hidden *= self._model.embedding_scale
        if embedding.add_position_embedding:
            hidden += functional.embedding(view.positions, embedding.position_embeddings.weight)
        return hidden

    def run_layers(self, hidden: torch.Tensor, view: CacheView) -> torch.Tensor:
        """See `StageProgram.run_layers`."""
        if view.decodes_only and self._fits_kernels and can_run_kernels(hidden):
            from megatron_adapters.kernels.decoding import can_attend_rows

            if can_attend_rows(self._heads, self._size, hidden.dtype):
                return self._run_kernels(hidden, view)
        angles = None if self._rotary is None else self._rotary.at(view.positions)
        local = angles
        if self._local_rotary is not None:
            local = self._local_rotary.at(view.positions)
        for layer in self._layers:
            turned = local if layer.is_windowed else angles
            change = self._attend(layer, layer.attention_norm.forward(hidden), view, turned)
            hidden += change if layer.context_norm is None else layer.context_norm(change)
            change = self._apply_mlp(layer, layer.mlp_norm.forward(hidden))
            hidden += change if layer.output_norm is None else layer.output_norm(change)
        return hidden

    def compute_logits(self, hidden: torch.Tensor, view: CacheView) -> torch.Tensor:
        """See `StageProgram.compute_logits`."""
        if view.wanted is not None:
            hidden = hidden[view.wanted]
        if self._final_norm is not None:
            hidden = self._final_norm(hidden)
        logits = self._products.linear(hidden, _output_weight(self._model))
        if not self._is_split:
            return logits
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        return gather_from_tensor_model_parallel_region(logits, group=self._tensor_group)

    def _run_kernels(self, hidden: torch.Tensor, view: CacheView) -> torch.Tensor:
        """The layers of a pass in which all tokens decode, by kernels made for that."""
        from megatron_adapters.kernels.decoding import (
            add_and_normalize,
            attend_rows,
            turn_and_write,
        )

        change = None
        for layer in self._layers:
            norm = layer.attention_norm
            normed = add_and_normalize(hidden, change, norm.weight, norm.eps)
            mixed = self._products.linear(normed, layer.qkv.weight, layer.qkv.bias)
            rotary = self._local_rotary if layer.is_windowed else None
            rotary = rotary or self._rotary
            keys, values = view.layer_cache(layer.number)
            query = turn_and_write(
                mixed.view(len(hidden), self._groups, -1, self._size),
                None if rotary is None else rotary.tables,
                view.positions,
                view.slots,
                keys,
                values,
            )
            context = attend_rows(
                query,
                keys,
                values,
                view.positions,
                layer.softmax_scale or self._size**-0.5,
                longest=view.longest,
                window=view.window if layer.is_windowed else None,
            )
            change = self._project(context, layer.projection)
            norm = layer.mlp_norm
            normed = add_and_normalize(hidden, change, norm.weight, norm.eps)
            change = self._apply_mlp(layer, normed)
        return hidden if change is None else hidden.add_(change)

    def _attend(
        self, layer: DenseLayer, hidden: torch.Tensor, view: CacheView, angles: _Angles | None
    ) -> torch.Tensor:
        mixed = self._products.linear(hidden, layer.qkv.weight, layer.qkv.bias)
        # For each group its query heads, its key and its value.
        mixed = mixed.view(hidden.shape[0], self._groups, -1, self._size)
        turned, value = mixed[:, :, :-1], mixed[:, :, -1]
        if layer.query_norm is not None or layer.key_norm is not None:
            query, key = turned[:, :, :-1], turned[:, :, -1:]
            query = query if layer.query_norm is None else layer.query_norm(query)
            key = key if layer.key_norm is None else layer.key_norm(key)
            turned = torch.cat([query, key], 2)
        if angles is not None:
            turned = angles.turn(turned)
        context = view.attend(
            layer.number,
            turned[:, :, :-1],
            turned[:, :, -1],
            value,
            layer.softmax_scale,
            is_windowed=layer.is_windowed,
        )
        return self._project(context, layer.projection)

    def _apply_mlp(self, layer: DenseLayer, hidden: torch.Tensor) -> torch.Tensor:
        if self._is_gated and hidden.dtype == torch.float32 and hidden.device.type == "cpu":
            # A column for each token: both halves lie in one piece, and the product is faster.
            wide = torch.mm(layer.fc1.weight, hidden.t())
            if layer.fc1.bias is not None:
                wide += layer.fc1.bias[:, None]
            gate, up = wide.chunk(2)
            return self._project(self._activation(gate).mul_(up).t(), layer.fc2)
        wide = self._products.linear(hidden, layer.fc1.weight, layer.fc1.bias)
        if self._is_gated and self._activation is functional.silu and can_run_kernels(wide):
            from megatron_adapters.kernels.elementwise import gate

            wide = gate(wide)
        elif self._is_gated:
            gate, up = wide.chunk(2, -1)
            wide = self._activation(gate).mul_(up)
        else:
            wide = self._activation(wide)
        return self._project(wide, layer.fc2)

    def _project(self, hidden: torch.Tensor, linear: DenseLinear) -> torch.Tensor:
        """A product whose input is split over the tensor-parallel ranks."""
        if not self._is_split:
            return self._products.linear(hidden, linear.weight, linear.bias)
        hidden = self._products.linear(hidden, linear.weight)
        dist.all_reduce(hidden, group=self._tensor_group)
        return hidden if linear.bias is None else hidden + linear.bias


class ModuleProgram:
    """Any model, through Megatron's modules; the packed tokens are a sequence of one row.

    Args:
        model: GPTModel of this stage.
        max_length: longest sequence, tokens.
    """

    def __init__(self, model: Any, max_length: int) -> None:
        self._model = model
        self._tables = model.build_rotary(max_length, next(model.parameters()).device)

    @property
    def fills_rows(self) -> bool:
        """See `StageProgram.fills_rows`: experts would count them."""
        return False

    def prepare(self, num_rows: int) -> None:
        """See `StageProgram.prepare`: modules read the live weights in each pass."""

    def embed(self, view: CacheView) -> torch.Tensor:
        """See `StageProgram.embed`."""
        hidden = self._model.embedding(
            input_ids=view.token_ids[None], position_ids=view.positions[None]
        )
        if self._model.embedding_scale is not None:
            hidden = hidden * self._model.embedding_scale
        return hidden[:, 0]

    def run_layers(self, hidden: torch.Tensor, view: CacheView) -> torch.Tensor:
        """See `StageProgram.run_layers`; the last stage's final norm is among the layers."""
        decoder = self._model.decoder
        decoder.set_input_tensor(hidden[:, None])
        if self._tables is not None:
            turns = self._tables.turns_at(view.positions)
            local = self._tables.local_turns_at(view.positions)
            view = replace(view, turns=turns, local_turns=local or turns)
        hidden = decoder(hidden_states=hidden[:, None], attention_mask=view)
        return hidden[:, 0]

    def compute_logits(self, hidden: torch.Tensor, view: CacheView) -> torch.Tensor:
        """See `StageProgram.compute_logits`."""
        if view.wanted is not None:
            hidden = hidden[view.wanted]
        weight = None
        if self._model.share_embeddings_and_output_weights:
            weight = self._model.shared_embedding_or_output_weight()
        logits, _ = self._model.output_layer(
            hidden[None], weight=weight, runtime_gather_output=True
        )
        return logits[0]


@dataclass(frozen=True)
class _Angles:
    """Cosine and signed sine of each token's position, [packed, 1, 1, size] each."""

    cosine: torch.Tensor
    sine: torch.Tensor

    def turn(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotary positions of [packed, groups, heads, size]; rounds as `fused.rotate` does."""
        size = self.cosine.shape[-1]
        rest = None
        if size < heads.shape[-1]:
            heads, rest = heads[..., :size], heads[..., size:]
        swapped = heads.roll(size // 2, -1)
        turned = (heads * self.cosine).addcmul_(swapped, self.sine)
        return turned if rest is None else torch.cat([turned, rest], -1)


class _Rotary:
    """Tables of the angles of all positions.

    Args:
        angles: [positions, pairs] float32.
        dtype: of the hidden states.

    Attributes:
        tables: cosines and sines, [positions, pairs] each.
    """

    def __init__(self, angles: torch.Tensor, dtype: torch.dtype) -> None:
        self.tables = angles.cos().to(dtype), angles.sin().to(dtype)
        angles = build_doubled_angles(angles, is_interleaved=False)
        sign = torch.ones_like(angles[0])
        sign[: len(sign) // 2] = -1.0
        self._cosine = angles.cos().to(dtype)[:, None, None]
        self._sine = (angles.sin() * sign).to(dtype)[:, None, None]

    def at(self, positions: torch.Tensor) -> _Angles:
        return _Angles(self._cosine[positions], self._sine[positions])


def _fits_kernels(layer: DenseLayer) -> bool:
    """Whether a layer is of the usual parts, for which there are kernels."""
    norms = (layer.attention_norm, layer.mlp_norm)
    others = (layer.query_norm, layer.key_norm, layer.context_norm, layer.output_norm)
    is_plain = all(norm.bias is None and not norm.is_zero_centered for norm in norms)
    return is_plain and all(norm is None for norm in others)


def _output_weight(model: Any) -> torch.Tensor:
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def _dtype(model: Any) -> torch.dtype:
    return model.config.params_dtype
