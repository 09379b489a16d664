"""What the config.json of families with experts means in Megatron's fields, and back. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chatlearn.config.expert_layers import find_expert_layers
from chatlearn.errors import ConfigError
from megatron_adapters.weights.config_file import ModelConfigFile, Rope
from megatron_adapters.weights.dense_families import (
    read_mistral,
    read_qwen3,
    write_mistral,
    write_qwen3,
)

__all__ = [
    "read_deepseek",
    "read_mixtral",
    "read_qwen3_moe",
    "write_deepseek",
    "write_mixtral",
    "write_qwen3_moe",
]

Fields = dict[str, Any]

_EXPERTS = {
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
}
_RANKED_EXPERTS = 2
_LATENT = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
}
_YARN = {
    "factor": "rotary_scaling_factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# What transformers takes where a config.json says nothing.
_YARN_DEFAULTS = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}


def _read_softmax_router(config: ModelConfigFile, *, is_normalized: bool) -> Fields:
    """Experts chosen by a softmax.

    Where the chosen ones' shares are normalised, they are the softmax over the chosen.
    """
    return {
        "num_moe_experts": int(config.need("num_local_experts")),
        "moe_router_topk": int(config.need("num_experts_per_tok")),
        "moe_router_pre_softmax": not is_normalized,
        "moe_router_load_balancing_type": "none",
    }


def read_mixtral(config: ModelConfigFile) -> Fields:
    """Fields of Mixtral."""
    router = _read_softmax_router(config, is_normalized=True)
    sizes = {"moe_ffn_hidden_size": int(config.need("intermediate_size"))}
    return {**read_mistral(config), **router, **sizes}


def write_mixtral(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_mixtral`."""
    return {
        **write_mistral(fields),
        "num_local_experts": fields["num_moe_experts"],
        "num_experts_per_tok": fields["moe_router_topk"],
        "intermediate_size": fields.get("moe_ffn_hidden_size") or fields["ffn_hidden_size"],
    }


def read_qwen3_moe(config: ModelConfigFile) -> Fields:
    """Fields of Qwen3-MoE."""
    values = dict(config.values)
    values.setdefault("num_local_experts", config.get("num_experts"))
    router = _read_softmax_router(
        ModelConfigFile(config.path, values),
        is_normalized=bool(config.get("norm_topk_prob", False)),
    )
    count, step = int(config.need("num_hidden_layers")), int(config.get("decoder_sparse_step", 1))
    dense = set(config.get("mlp_only_layers", []))
    pattern = [int(n not in dense and (n + 1) % step == 0) for n in range(count)]
    sizes = {"moe_ffn_hidden_size": int(config.need("moe_intermediate_size"))}
    layers = {} if all(pattern) else {"moe_layer_freq": pattern}
    return {**read_qwen3(config), **router, **sizes, **layers}


def write_qwen3_moe(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_qwen3_moe`."""
    pattern = find_expert_layers(fields.get("moe_layer_freq") or 1, fields["num_layers"])
    return {
        **write_qwen3(fields),
        **{key: fields[field] for key, field in _EXPERTS.items()},
        "num_experts": fields["num_moe_experts"],
        "num_local_experts": fields["num_moe_experts"],
        "norm_topk_prob": not fields.get("moe_router_pre_softmax", False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [n for n, has_experts in enumerate(pattern) if not has_experts],
    }


def read_deepseek(config: ModelConfigFile) -> Fields:
    """Fields of DeepSeek-V3: latent attention, a sigmoid router with a bias, shared experts."""
    config.refuse_unless("attention_bias", False)
    config.refuse_unless("rope_interleave", True)
    config.refuse_unless("scoring_func", "sigmoid")
    config.refuse_unless("topk_method", "noaux_tc")
    config.refuse_unless("norm_topk_prob", True)
    config.refuse_unless("moe_layer_freq", 1)
    count, dense = (
        int(config.need("num_hidden_layers")),
        int(config.get("first_k_dense_replace", 0)),
    )
    groups = config.get("n_group", 1)
    inner, shared = int(config.need("moe_intermediate_size")), config.get("n_shared_experts", 0)
    fields: Fields = {
        "multi_latent_attention": True,
        **{field: config.values.get(key) for key, field in _LATENT.items()},
        **_read_latent_positions(config, config.read_rope()),
        "qk_layernorm": True,
        "num_moe_experts": int(config.need("n_routed_experts")),
        **{field: int(config.need(key)) for key, field in _EXPERTS.items()},
        "moe_layer_freq": [int(number >= dense) for number in range(count)],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_topk_scaling_factor": float(config.get("routed_scaling_factor", 1.0)),
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
    }
    if shared:
        fields["moe_shared_expert_intermediate_size"] = inner * int(shared)
    if groups > 1:
        fields["moe_router_num_groups"] = int(groups)
        fields["moe_router_group_topk"] = int(config.need("topk_group"))
        # A group's rank is the sum of its best two; Megatron takes as many as it chooses of each.
        if fields["moe_router_topk"] // fields["moe_router_group_topk"] != _RANKED_EXPERTS:
            raise ConfigError(
                f"{config.path}: num_experts_per_tok={fields['moe_router_topk']} and topk_group="
                f"{fields['moe_router_group_topk']}: with groups, twice as many experts as groups "
                "are chosen in the models that are supported"
            )
    return fields


def _read_latent_positions(config: ModelConfigFile, rope: Rope) -> Fields:
    fields: Fields = {"rotary_base": rope.base, "rope_type": "rope"}
    if rope.scaling is None:
        return fields
    if rope.scaling["rope_type"] != "yarn":
        raise ConfigError(
            f"{config.path}: rope_type {rope.scaling['rope_type']!r} with multi-latent attention "
            "is not supported; expected default or yarn"
        )
    given = {**_YARN_DEFAULTS, **{k: v for k, v in rope.scaling.items() if v is not None}}
    missing = [key for key in _YARN if key not in given]
    if missing:
        raise ConfigError(f"{config.path}: yarn positions need {', '.join(missing)}")
    return {**fields, "rope_type": "yarn", **{f: given[key] for key, f in _YARN.items()}}


def write_deepseek(fields: Mapping[str, Any]) -> Fields:
    """The reverse of `read_deepseek`."""
    inner = fields["moe_ffn_hidden_size"]
    shared = fields.get("moe_shared_expert_intermediate_size") or 0
    pattern = find_expert_layers(fields.get("moe_layer_freq") or 1, fields["num_layers"])
    dense = pattern.index(True) if True in pattern else len(pattern)
    if shared % inner or not all(pattern[dense:]):
        raise ConfigError(
            "moe_shared_expert_intermediate_size, moe_layer_freq: deepseek_v3 has whole shared "
            "experts, and dense layers before those with experts only"
        )
    rope: Fields = {"rope_theta": float(fields.get("rotary_base", 10000)), "rope_type": "default"}
    if fields.get("rope_type") == "yarn":
        rope |= {"rope_type": "yarn", **{key: fields[field] for key, field in _YARN.items()}}
    return {
        **{key: fields.get(field) for key, field in _LATENT.items()},
        **{key: fields[field] for key, field in _EXPERTS.items()},
        "num_key_value_heads": fields["num_attention_heads"],
        "rope_parameters": rope,
        "rope_interleave": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "n_routed_experts": fields["num_moe_experts"],
        "n_shared_experts": shared // inner,
        "n_group": fields.get("moe_router_num_groups") or 1,
        "topk_group": fields.get("moe_router_group_topk") or 1,
        "first_k_dense_replace": dense,
        "norm_topk_prob": True,
        "routed_scaling_factor": fields.get("moe_router_topk_scaling_factor") or 1.0,
        "num_nextn_predict_layers": 0,
    }
