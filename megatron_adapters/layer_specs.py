# pyright: standard, reportPrivateImportUsage=false
"""Which modules a layer is made of: Transformer Engine's where it can run, else our own."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from chatlearn.config.expert_layers import find_expert_layers
from megatron_adapters.attention import FusedAttention
from megatron_adapters.fused import SwiGLU
from megatron_adapters.norm import FusedNorm

__all__ = [
    "build_block_spec",
    "has_transformer_engine",
    "is_transformer_engine_installed",
    "needs_own_layers",
]


def has_transformer_engine(device: torch.device, fields: Mapping[str, Any]) -> bool:
    """Whether a model's layers are made of Transformer Engine's modules.

    Args:
        device: where the model lives.
        fields: its flat Megatron fields.
    """
    is_gpu = device.type == "cuda"
    return is_gpu and is_transformer_engine_installed() and not needs_own_layers(fields)


def needs_own_layers(fields: Mapping[str, Any]) -> bool:
    """Whether a model has parts that are not made of Transformer Engine's modules anywhere."""
    return bool(fields.get("sandwich_norms") or fields.get("multi_latent_attention"))


def is_transformer_engine_installed() -> bool:
    """Whether this machine has Transformer Engine; it is not imported."""
    return importlib.util.find_spec("transformer_engine") is not None


def build_block_spec(
    config: Any, vp_stage: int | None, *, use_te: bool, has_sandwich_norms: bool = False
) -> Any:
    """The layers of one model chunk and its final norm, as Megatron's TransformerBlockSubmodules.

    Args:
        config: Megatron's TransformerConfig.
        vp_stage: the chunk's index within the pipeline stage; None without virtual stages.
        use_te: make the layers of Transformer Engine's modules.
        has_sandwich_norms: attention and MLP have norms behind them, too.
    """
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage))
    pattern = (False,) * config.num_layers
    if config.num_moe_experts is not None:
        pattern = find_expert_layers(config.moe_layer_freq, config.num_layers)
    kinds = {pattern[number] for number in numbers}
    layers = {kind: _build_layer_spec(config, has_experts=kind, use_te=use_te) for kind in kinds}
    norm: Any = FusedNorm
    if use_te:
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    if has_sandwich_norms:
        from megatron_adapters.sandwich_layer import SandwichLayer

        for layer in layers.values():
            layer.module = SandwichLayer
    specs = [layers[pattern[number]] for number in numbers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm)


def _build_layer_spec(config: Any, *, has_experts: bool, use_te: bool) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    options = {
        "num_experts": config.num_moe_experts if has_experts else None,
        "moe_grouped_gemm": config.moe_grouped_gemm,
        "qk_layernorm": config.qk_layernorm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if use_te:
        layer = get_gpt_layer_with_transformer_engine_spec(**options)
        parts: Any = layer.submodules
        # Its own attention knows neither our packed streams nor our cache.
        parts.self_attention.submodules.core_attention = FusedAttention
    else:
        layer = get_gpt_layer_local_spec(**options, normalization=config.normalization)
        _use_own_parts(layer, config)
    return layer


def _use_own_parts(layer: Any, config: Any) -> None:
    parts = layer.submodules
    parts.input_layernorm = FusedNorm
    parts.pre_mlp_layernorm = FusedNorm
    attention = replace(parts.self_attention.submodules, core_attention=FusedAttention)
    if config.multi_latent_attention:
        from megatron_adapters.latent_attention import LatentAttention

        parts.self_attention.module = LatentAttention
        if config.qk_layernorm:
            attention = replace(attention, q_layernorm=FusedNorm, kv_layernorm=FusedNorm)
    elif config.qk_layernorm:
        attention = replace(attention, q_layernorm=FusedNorm, k_layernorm=FusedNorm)
    parts.self_attention.submodules = attention
    if config.use_te_activation_func:
        _use_own_activation(parts.mlp)
    # Without Transformer Engine's fused modules the norms keep their own names.
    parts.sharded_state_dict_keys_map = {}


def _use_own_activation(spec: Any) -> None:
    """Give every MLP below a spec, experts included, the fused activation."""
    from megatron.core.transformer.mlp import MLPSubmodules

    parts = getattr(spec, "submodules", None)
    if isinstance(parts, MLPSubmodules):
        parts.activation_func = SwiGLU  # type: ignore[assignment]
    elif parts is not None:
        for inner in vars(parts).values():
            _use_own_activation(inner)
