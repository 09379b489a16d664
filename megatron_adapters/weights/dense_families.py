"""What the config.json of dense families means in Megatron's fields, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from chatlearn.errors import ConfigError
from megatron_adapters.weights.config_file import ModelConfigFile, Rope

__all__ = [
    "read_gemma3",
    "read_llama",
    "read_mistral",
    "read_qwen2",
    "read_qwen3",
    "write_gemma3",
    "write_llama",
    "write_mistral",
    "write_qwen2",
    "write_qwen3",
]

Fields = dict[str, Any]


def _read_grouped(config: ModelConfigFile) -> Fields:
    """Grouped-query attention."""
    heads = int(config.need("num_attention_heads"))
    size = config.get("head_dim", int(config.need("hidden_size")) // heads)
    return {
        "num_query_groups": int(config.get("num_key_value_heads", heads)),
        "kv_channels": int(size),
    }


def _write_grouped(fields: Mapping[str, Any]) -> Fields:
    heads = fields["num_attention_heads"]
    return {
        "num_key_value_heads": fields.get("num_query_groups") or heads,
        "head_dim": fields.get("kv_channels") or fields["hidden_size"] // heads,
    }


def _read_positions(config: ModelConfigFile, rope: Rope) -> Fields:
    if rope.percent != 1.0:
        raise ConfigError(
            f"{config.path}: partial_rotary_factor is {rope.percent}, expected 1: such a model is "
            "not supported"
        )
    fields: Fields = {"rotary_base": rope.base}
    if rope.scaling is not None:
        fields["rope_scaling"] = dict(rope.scaling)
    return fields


def _write_positions(fields: Mapping[str, Any]) -> Fields:
    scaling = fields.get("rope_scaling") or {"rope_type": "default"}
    return {"rope_parameters": {"rope_theta": float(fields.get("rotary_base", 10000)), **scaling}}


def read_llama(config: ModelConfigFile) -> Fields:
    """Fields of Llama 2 and 3."""
    has_bias = bool(config.get("attention_bias", False))
    if has_bias != bool(config.get("mlp_bias", False)):
        raise ConfigError(
            f"{config.path}: attention_bias and mlp_bias differ: Megatron's layers have biases "
            "everywhere or nowhere"
        )
    fields = {**_read_grouped(config), **_read_positions(config, config.read_rope())}
    return {**fields, "add_bias_linear": has_bias}


def write_llama(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_llama`."""
    has_bias = bool(fields.get("add_bias_linear", False))
    return {
        **_write_grouped(fields),
        **_write_positions(fields),
        "hidden_act": "silu",
        "attention_bias": has_bias,
        "mlp_bias": has_bias,
    }


def _read_plain(config: ModelConfigFile) -> Fields:
    """Without biases, but for those that a family always has."""
    config.refuse_unless("attention_bias", False)
    return {**_read_grouped(config), **_read_positions(config, config.read_rope())}


def _write_plain(fields: Mapping[str, Any]) -> Fields:
    return {**_write_grouped(fields), **_write_positions(fields), "hidden_act": "silu"}


def _read_window(config: ModelConfigFile) -> Fields:
    """Transformers counts a token itself to its window, Megatron does not."""
    window = config.get("sliding_window")
    return {} if window is None else {"window_size": [int(window) - 1, 0]}


def _write_window(fields: Mapping[str, Any]) -> Fields:
    window = fields.get("window_size")
    return {"sliding_window": None if window is None else window[0] + 1}


def read_mistral(config: ModelConfigFile) -> Fields:
    """Fields of Mistral."""
    return {**_read_plain(config), **_read_window(config)}


def write_mistral(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_mistral`."""
    return {**_write_plain(fields), **_write_window(fields)}


def _read_layer_windows(config: ModelConfigFile) -> Fields:
    """Qwen's windows, which it has only where `use_sliding_window` says so."""
    if not config.get("use_sliding_window", False):
        return {}
    fields = _read_window(config)
    kinds = config.get("layer_types")
    count = int(config.need("num_hidden_layers"))
    if kinds is None:
        first = int(config.get("max_window_layers", count))
        kinds = ["sliding_attention" if n >= first else "full_attention" for n in range(count)]
    pattern = [int(kind == "sliding_attention") for kind in kinds]
    return {**fields, "window_attn_skip_freq": pattern} if fields and any(pattern) else {}


def _write_layer_windows(fields: Mapping[str, Any]) -> Fields:
    if fields.get("window_size") is None:
        return {"use_sliding_window": False, "sliding_window": None}
    kinds = _window_kinds(fields)
    return {"use_sliding_window": True, **_write_window(fields), "layer_types": kinds}


def _window_kinds(fields: Mapping[str, Any]) -> list[str]:
    """`window_attn_skip_freq` as transformers' `layer_types`."""
    skip, count = fields.get("window_attn_skip_freq"), fields["num_layers"]
    if isinstance(skip, list | tuple):
        has_window = [bool(flag) for flag in cast("list[Any]", skip)]
    else:
        has_window = [not skip or number % skip != 0 for number in range(1, count + 1)]
    return ["sliding_attention" if flag else "full_attention" for flag in has_window]


def read_qwen2(config: ModelConfigFile) -> Fields:
    """Fields of Qwen2, whose projections to queries, keys and values have biases."""
    fields = {**_read_grouped(config), **_read_positions(config, config.read_rope())}
    return {**fields, **_read_layer_windows(config), "add_qkv_bias": True}


def write_qwen2(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_qwen2`."""
    return {**_write_plain(fields), **_write_layer_windows(fields)}


def read_qwen3(config: ModelConfigFile) -> Fields:
    """Fields of Qwen3, whose queries and keys are normalised."""
    return {**_read_plain(config), **_read_layer_windows(config), "qk_layernorm": True}


def write_qwen3(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_qwen3`."""
    return {**write_qwen2(fields), "attention_bias": False}


def read_gemma3(config: ModelConfigFile) -> Fields:
    """Fields of Gemma 3 (text): norms around both halves of a layer, layers of two kinds."""
    config.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    count = int(config.need("num_hidden_layers"))
    step = int(config.get("sliding_window_pattern", config.get("_sliding_window_pattern", 6)))
    kinds = config.get(
        "layer_types",
        ["full_attention" if n % step == 0 else "sliding_attention" for n in range(1, count + 1)],
    )
    rope, local = config.read_rope("full_attention"), config.read_rope("sliding_attention")
    has_kinds = "sliding_attention" in config.get("rope_parameters", {})
    if has_kinds and local.scaling is not None:
        raise ConfigError(f"{config.path}: windowed layers with rope scaling are not supported")
    base = (
        1e6
        if not config.get("rope_parameters") and "rope_theta" not in config.values
        else rope.base
    )
    local_base = local.base if has_kinds else float(config.get("rope_local_base_freq", 10000.0))
    fields = {**_read_plain(config), **_read_positions(config, rope), **_read_window(config)}
    return {
        **fields,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", True),
        "rotary_base": base,
        "rotary_base_local": local_base,
        "window_attn_skip_freq": [int(kind == "sliding_attention") for kind in kinds],
        "swiglu": False,
        "gated_linear_unit": True,
        "activation": "gelu_tanh",
        "sandwich_norms": True,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
        "embedding_scale": float(config.need("hidden_size")) ** 0.5,
        "softmax_scale": float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
    }


def write_gemma3(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_gemma3`."""
    scaling = fields.get("rope_scaling") or {"rope_type": "default"}
    ropes = {
        "full_attention": {"rope_theta": float(fields["rotary_base"]), **scaling},
        "sliding_attention": {
            "rope_theta": float(fields["rotary_base_local"]),
            "rope_type": "default",
        },
    }
    return {
        **_write_grouped(fields),
        **_write_window(fields),
        "rope_parameters": ropes,
        "layer_types": _window_kinds(fields),
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "query_pre_attn_scalar": round(fields["softmax_scale"] ** -2),
    }
