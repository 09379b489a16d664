"""From Megatron's global names to those of transformers' Llama-like decoders, and back. Pure.

The names are those that a live model of transformers 5 has (`state_dict()`): Llama, Mistral,
Qwen2, Qwen3, and with experts Mixtral, Qwen2-MoE, Qwen3-MoE and GLM-4-MoE. Which of them a model
has is read off its fields: a bias, a norm, a shared expert is there or it is not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.parallel.renaming import Piece, Region, Renaming
from chatlearn.parallel.sharding import Box
from megatron_adapters.weights.architecture import (
    Architecture,
    ExpertSizes,
    GroupedAttention,
    Head,
    read_architecture,
)

__all__ = ["huggingface_renaming"]


def huggingface_renaming(
    fields: Mapping[str, Any], *, head: Head = "lm", use_te: bool = False
) -> Renaming:
    """The renaming from Megatron's naming to that of `transformers`; one for every layout.

    The vocabulary has no padding on either side. Tied embeddings are `embed_tokens` only. A scalar
    head is the `score` of a sequence classifier with one label.

    Args:
        fields: the flat Megatron fields of the model.
        head: `lm` or `scalar`.
        use_te: the layers are Transformer Engine's modules, which hold the norms before them.

    Raises:
        ConfigError: a field says that the model has weights which the families above lack, or
            weights that mean something else there; names the field.
    """
    # How a rank computes its experts changes neither the names nor the shapes.
    model = read_architecture({**fields, "moe_grouped_gemm": None}, ParallelLayout(), head)
    attention = _check(model, fields)
    pieces = [*_outer_pieces(model)]
    for number in range(model.num_layers):
        layer = _Layer(number, model.num_layers if model.has_stacked_layers else None)
        experts = model.experts if model.expert_layers[number] else None
        pieces.extend(_attention_pieces(layer, model, attention))
        pieces.extend(_norm_pieces(layer, model, use_te=use_te, is_dense=experts is None))
        if experts is None:
            pieces.extend(_mlp_pieces(layer, model, "mlp", "mlp", model.ffn_size))
        else:
            pieces.extend(_expert_pieces(layer, model, experts))
    return Renaming(tuple(pieces))


def _check(model: Architecture, fields: Mapping[str, Any]) -> GroupedAttention:
    """The attention of a model whose weights all have a name in transformers."""
    attention = model.attention
    is_grouped = isinstance(attention, GroupedAttention)
    refused = {
        "multi_latent_attention": not is_grouped,
        "attention_output_gate": is_grouped and attention.has_output_gate,
        "position_embedding_type": model.num_positions > 0,
        "rotary_interleaved": bool(fields.get("rotary_interleaved")),
        "normalization": model.has_norm_bias,
        "layernorm_zero_centered_gamma": bool(fields.get("layernorm_zero_centered_gamma")),
        "swiglu": not model.is_gated,
        "add_bias_linear": model.has_bias and model.experts is not None,
    }
    found = [field for field, is_refused in refused.items() if is_refused]
    if found or not isinstance(attention, GroupedAttention):
        raise ConfigError(
            f"{', '.join(found)}: such a model has no counterpart among transformers' Llama-like "
            "families, so its weights cannot be given Hugging Face names; they have rotary "
            "positions, RMSNorm, a gated MLP and grouped-query attention"
        )
    return attention


@dataclass(frozen=True)
class _Part:
    """Entries of a layer's tensor along one axis, from `start` on."""

    name: str
    shape: tuple[int, ...]
    start: int = 0

    def box(self, size: int, axis: int) -> Box:
        """`size` of the entries along `axis`."""
        offset, shape = [0] * len(self.shape), list(self.shape)
        offset[axis], shape[axis] = self.start, size
        return Box(tuple(offset), tuple(shape))


@dataclass(frozen=True)
class _Layer:
    """Makes the pieces of one layer.

    Attributes:
        number: of the layer, from 0.
        num_stacked: length of the axis that Megatron stacks the layers along; None: each layer
            has tensors of its own.
    """

    number: int
    num_stacked: int | None

    def rename(self, name: str, shape: tuple[int, ...], new_name: str) -> Piece:
        """A tensor that only gets another name."""
        return self.move(_Part(name, shape), _Part(new_name, shape), shape[0])

    def move(self, old: _Part, new: _Part, size: int, axis: int = 0) -> Piece:
        """`size` entries along `axis` of one tensor that are entries of another."""
        key = f"model.layers.{self.number}.{new.name}"
        new_region = Region(key, new.shape, new.box(size, axis))
        box = old.box(size, axis)
        if self.num_stacked is None:
            key = f"decoder.layers.{self.number}.{old.name}"
            return Piece(Region(key, old.shape, box), new_region)
        stacked = Box((self.number, *box.offset), (1, *box.shape))
        shape = (self.num_stacked, *old.shape)
        return Piece(Region(f"decoder.layers.{old.name}", shape, stacked), new_region)


def _outer_pieces(model: Architecture) -> Iterator[Piece]:
    """What lies before and after the layers."""
    hidden, vocabulary = (model.hidden_size,), (model.vocab_size, model.hidden_size)
    yield _rename("embedding.word_embeddings.weight", vocabulary, "model.embed_tokens.weight")
    yield _rename("decoder.final_layernorm.weight", hidden, "model.norm.weight")
    if model.head == "scalar":
        yield _rename("output_layer.weight", (1, model.hidden_size), "score.weight")
    elif not model.is_tied:
        yield _rename("output_layer.weight", vocabulary, "lm_head.weight")


def _rename(key: str, shape: tuple[int, ...], new_key: str) -> Piece:
    return Piece(Region.whole(key, shape), Region.whole(new_key, shape))


def _norm_pieces(
    layer: _Layer, model: Architecture, *, use_te: bool, is_dense: bool
) -> Iterator[Piece]:
    shape = (model.hidden_size,)
    first = "self_attention.linear_qkv.layer_norm_weight" if use_te else "input_layernorm.weight"
    is_fused = use_te and is_dense
    second = "mlp.linear_fc1.layer_norm_weight" if is_fused else "pre_mlp_layernorm.weight"
    yield layer.rename(first, shape, "input_layernorm.weight")
    yield layer.rename(second, shape, "post_attention_layernorm.weight")


def _attention_pieces(
    layer: _Layer, model: Architecture, sizes: GroupedAttention
) -> Iterator[Piece]:
    hidden = model.hidden_size
    output = "self_attention.linear_proj", "self_attn.o_proj"
    shape = (hidden, sizes.query_size)
    yield layer.rename(f"{output[0]}.weight", shape, f"{output[1]}.weight")
    yield from _qkv_pieces(layer, sizes, "weight", (hidden,))
    if model.has_bias:
        yield layer.rename(f"{output[0]}.bias", (hidden,), f"{output[1]}.bias")
    if model.has_qkv_bias:
        yield from _qkv_pieces(layer, sizes, "bias", ())
    if model.has_qk_norm:
        for name in ("q", "k"):
            old, new = f"self_attention.{name}_layernorm.weight", f"self_attn.{name}_norm.weight"
            yield layer.rename(old, (sizes.head_size,), new)


def _qkv_pieces(
    layer: _Layer, sizes: GroupedAttention, kind: str, columns: tuple[int, ...]
) -> Iterator[Piece]:
    """Megatron holds, group by group, the group's query heads, its key head and its value head."""
    fused = (sizes.fused_size, *columns)
    size = sizes.head_size
    query_rows = sizes.query_size // sizes.num_groups
    start = 0
    for group in range(sizes.num_groups):
        for name, rows in (("q", query_rows), ("k", size), ("v", size)):
            old = _Part(f"self_attention.linear_qkv.{kind}", fused, start)
            shape = (rows * sizes.num_groups, *columns)
            new = _Part(f"self_attn.{name}_proj.{kind}", shape, group * rows)
            yield layer.move(old, new, rows)
            start += rows


def _mlp_pieces(
    layer: _Layer, model: Architecture, old: str, new: str, ffn_size: int
) -> Iterator[Piece]:
    """Megatron's first layer is the gate's rows, then the up projection's."""
    hidden = model.hidden_size
    kinds = [("weight", (hidden,))] + ([("bias", ())] if model.has_bias else [])
    for kind, columns in kinds:
        for number, name in enumerate(("gate", "up")):
            fused = (2 * ffn_size, *columns)
            rows = _Part(f"{old}.linear_fc1.{kind}", fused, number * ffn_size)
            whole = _Part(f"{new}.{name}_proj.{kind}", (ffn_size, *columns))
            yield layer.move(rows, whole, ffn_size)
    shape = (hidden, ffn_size)
    yield layer.rename(f"{old}.linear_fc2.weight", shape, f"{new}.down_proj.weight")
    if model.has_bias:
        yield layer.rename(f"{old}.linear_fc2.bias", (hidden,), f"{new}.down_proj.bias")


def _expert_pieces(layer: _Layer, model: Architecture, sizes: ExpertSizes) -> Iterator[Piece]:
    """A live model of transformers 5 stacks its experts, and gate on up, as Megatron does."""
    hidden, count = model.hidden_size, sizes.num_experts
    yield layer.rename("mlp.router.weight", (count, hidden), "mlp.gate.weight")
    if sizes.has_selection_bias:
        new = "mlp.gate.e_score_correction_bias"
        yield layer.rename("mlp.router.expert_bias", (count,), new)
    fused, down = (count, 2 * sizes.ffn_size, hidden), (count, hidden, sizes.ffn_size)
    old = "mlp.experts.experts"
    yield layer.rename(f"{old}.linear_fc1.weight", fused, "mlp.experts.gate_up_proj")
    yield layer.rename(f"{old}.linear_fc2.weight", down, "mlp.experts.down_proj")
    if sizes.shared_ffn_size is None:
        return
    # Qwen2-MoE has one shared expert behind a gate; the others have no gate and say "experts".
    new = "mlp.shared_expert" if sizes.has_shared_gate else "mlp.shared_experts"
    yield from _mlp_pieces(layer, model, "mlp.shared_experts", new, sizes.shared_ffn_size)
    if sizes.has_shared_gate:
        shape = (1, hidden)
        new = "mlp.shared_expert_gate.weight"
        yield layer.rename("mlp.shared_experts.gate_weight", shape, new)
