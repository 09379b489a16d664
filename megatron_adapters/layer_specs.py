"""Which modules a layer is made of: Transformer Engine's where it can run, else our own."""

import importlib.util
from dataclasses import replace
from typing import Any

import torch

from megatron_adapters.attention import FusedAttention
from megatron_adapters.norm import FusedNorm

__all__ = ["build_block_spec", "has_transformer_engine"]


def has_transformer_engine(device: torch.device) -> bool:
    """Whether Transformer Engine is installed and the model lives on a GPU."""
    return device.type == "cuda" and importlib.util.find_spec("transformer_engine") is not None


def build_block_spec(config: Any, vp_stage: int | None, *, use_cache: bool, use_te: bool) -> Any:
    """The layers of one model chunk and its final norm, as Megatron's TransformerBlockSubmodules.

    Args:
        config: Megatron's TransformerConfig.
        vp_stage: the chunk's index within the pipeline stage; None without virtual stages.
        use_cache: the model generates: attention must look up our key-value cache.
        use_te: make the layers of Transformer Engine's modules.
    """
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    options = {
        "num_experts": config.num_moe_experts,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
    }
    if use_te:
        layer = get_gpt_layer_with_transformer_engine_spec(**options)
        from megatron.core.extensions.transformer_engine import TENorm

        norm: Any = TENorm
        parts: Any = layer.submodules
        if use_cache:
            parts.self_attention.submodules.core_attention = FusedAttention
    else:
        layer = get_gpt_layer_local_spec(**options, normalization=config.normalization)
        norm = FusedNorm
        _use_own_parts(layer, has_qk_norm=bool(config.qk_layernorm))
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=norm)


def _use_own_parts(layer: Any, *, has_qk_norm: bool) -> None:
    parts = layer.submodules
    parts.input_layernorm = FusedNorm
    parts.pre_mlp_layernorm = FusedNorm
    attention = replace(parts.self_attention.submodules, core_attention=FusedAttention)
    if has_qk_norm:
        attention = replace(attention, q_layernorm=FusedNorm, k_layernorm=FusedNorm)
    parts.self_attention.submodules = attention
    # Without Transformer Engine's fused modules the norms keep their own names.
    parts.sharded_state_dict_keys_map = {}
