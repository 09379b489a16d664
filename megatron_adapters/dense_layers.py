# pyright: standard, reportPrivateImportUsage=false
"""Which of Megatron's models are dense decoders of known parts, and their layers' parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_adapters.fused import SwiGLU
from megatron_adapters.norm import FusedNorm

__all__ = ["DenseLayer", "DenseLinear", "TensorFunction", "is_dense"]


def is_dense(model: Any) -> bool:
    """Whether `DenseProgram` knows everything that this model is made of."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    config = model.config
    rotary = getattr(model, "rotary_pos_emb", None)
    has_known_config = not (
        config.fp32_residual_connection
        or config.apply_residual_connection_post_layernorm
        or config.bias_activation_fusion
        or config.attention_output_gate
        or config.no_rope_freq
        or config.rotary_interleaved
        or config.activation_func_clamp_value is not None
        or config.glu_linear_offset
        or config.sequence_parallel
        or config.fp8
        or config.fp4
    )
    has_known_positions = model.position_embedding_type in (
        "rope",
        "learned_absolute",
        "none",
    ) and (rotary is None or type(rotary) is RotaryEmbedding)
    final_norm = getattr(model.decoder, "final_layernorm", None)
    return (
        has_known_config
        and has_known_positions
        and (final_norm is None or type(final_norm) is FusedNorm)
        and all(_is_known_layer(layer) for layer in model.decoder.layers)
    )


def _is_known_layer(layer: Any) -> bool:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_adapters.attention import FusedAttention
    from megatron_adapters.sandwich_layer import SandwichLayer

    attention = layer.self_attention
    parts = [
        (attention, SelfAttention),
        (layer.cross_attention, IdentityOp),
        (layer.mlp, MLP),
        (layer.input_layernorm, FusedNorm),
        (layer.pre_mlp_layernorm, FusedNorm),
    ]
    if type(layer) not in (TransformerLayer, SandwichLayer):
        return False
    if not all(type(part) is kind for part, kind in parts):
        return False
    norms = (attention.q_layernorm, attention.k_layernorm)
    activation = layer.mlp.activation_func
    is_known = isinstance(activation, SwiGLU) or not layer.mlp.config.use_te_activation_func
    return (
        is_known
        and type(attention.linear_qkv) is ColumnParallelLinear
        and type(attention.linear_proj) is RowParallelLinear
        and type(attention.core_attention) is FusedAttention
        and type(layer.mlp.linear_fc1) is ColumnParallelLinear
        and type(layer.mlp.linear_fc2) is RowParallelLinear
        and all(norm is None or type(norm) in (FusedNorm, IdentityOp) for norm in norms)
        and attention.config.num_query_groups >= attention.world_size
    )


@dataclass(frozen=True)
class DenseLinear:
    """The parameters of a linear layer, this rank's share."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    @classmethod
    def of(cls, module: Any) -> DenseLinear:
        """Of Megatron's column- or row-parallel layer."""
        return cls(module.weight, module.bias)


TensorFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DenseLayer:
    """The weights of a layer, and its norms.

    `context_norm` and `output_norm` are those behind attention and MLP, which few models have.
    """

    number: int
    attention_norm: FusedNorm
    qkv: DenseLinear
    query_norm: TensorFunction | None
    key_norm: TensorFunction | None
    projection: DenseLinear
    softmax_scale: float | None
    mlp_norm: FusedNorm
    fc1: DenseLinear
    fc2: DenseLinear
    is_windowed: bool
    context_norm: TensorFunction | None
    output_norm: TensorFunction | None

    @classmethod
    def of(cls, layer: Any) -> DenseLayer:
        """Of Megatron's TransformerLayer."""
        from megatron_adapters.sandwich_layer import SandwichLayer

        attention, mlp = layer.self_attention, layer.mlp
        norms = (attention.q_layernorm, attention.k_layernorm)
        query_norm, key_norm = (
            norm.forward if isinstance(norm, FusedNorm) else None for norm in norms
        )
        return cls(
            layer.layer_number,
            layer.input_layernorm,
            DenseLinear.of(attention.linear_qkv),
            query_norm,
            key_norm,
            DenseLinear.of(attention.linear_proj),
            attention.core_attention.softmax_scale,
            layer.pre_mlp_layernorm,
            DenseLinear.of(mlp.linear_fc1),
            DenseLinear.of(mlp.linear_fc2),
            attention.core_attention.is_windowed,
            *(
                (layer.post_self_attn_layernorm.forward, layer.post_mlp_layernorm.forward)
                if isinstance(layer, SandwichLayer)
                else (None, None)
            ),
        )
