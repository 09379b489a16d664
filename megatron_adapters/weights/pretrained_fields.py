"""The fields of a model from a Hugging Face folder: the folder's, and the user's on top. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.errors import ConfigError
from megatron_adapters.weights.architecture import Head
from megatron_adapters.weights.config_file import ModelConfigFile, read_config_file
from megatron_adapters.weights.families import FAMILIES, Family, find_family

__all__ = ["CompletedFields", "check_family", "complete_fields", "head_of"]

# Fields that a user may set otherwise than the folder: they do not change what the weights mean.
_FREE = ("init_method_std", "moe_router_dtype", "moe_router_load_balancing_type")
# Fields that decide what a model computes. Where a folder says nothing of one, the model has none.
_SHAPING = (
    "activation",
    "activation_func_clamp_value",
    "add_bias_linear",
    "add_qkv_bias",
    "attention_output_gate",
    "embedding_scale",
    "gated_linear_unit",
    "layernorm_zero_centered_gamma",
    "moe_layer_freq",
    "moe_router_enable_expert_bias",
    "moe_router_group_topk",
    "moe_router_num_groups",
    "moe_router_score_function",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size",
    "multi_latent_attention",
    "no_rope_freq",
    "num_moe_experts",
    "qk_layernorm",
    "rope_scaling",
    "rotary_base_local",
    "rotary_interleaved",
    "rotary_percent",
    "sandwich_norms",
    "softmax_scale",
    "window_attn_skip_freq",
    "window_size",
)
_NEUTRAL: dict[str, Any] = {
    "moe_layer_freq": 1,
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": 1.0,
}


@dataclass(frozen=True)
class CompletedFields:
    """What a folder and a user's fields come to.

    Attributes:
        fields: all of them.
        notes: a line for each thing that a user may want to know, such as a difference.
    """

    fields: Mapping[str, Any]
    notes: tuple[str, ...]


def complete_fields(folder: str | Path, given: Mapping[str, Any], head: Head) -> CompletedFields:
    """The fields of `config.json`, with the user's own on top.

    A smaller `max_sequence_length` than the folder's is the user's choice; what would change the
    meaning of the weights is refused.

    Args:
        folder: in Hugging Face's format.
        given: the flat Megatron fields of the user.
        head: of the model to build.

    Raises:
        ConfigError: the folder's model is not known, has another head, or differs from what is
            given; lists every difference.
    """
    config = read_config_file(folder)
    family = find_family(config)
    found = family.read_fields(config)
    notes = [f"{family.name} from {folder}"]
    notes += _check_head(config, head)
    problems: list[str] = []
    for key, value in given.items():
        if key not in found:
            if key in _SHAPING and not _is_neutral(key, value):
                problems.append(f"{key}: got {value}, the folder's model has none")
        elif key == "max_sequence_length" and value <= found[key]:
            if value != found[key]:
                notes.append(f"{key}: {value}, of {found[key]} in {config.path.name}")
        elif key in _FREE:
            if not _is_same(value, found[key]):
                notes.append(f"{key}: {value}, not {found[key]} as in {config.path.name}")
        elif not _is_same(value, found[key]):
            problems.append(f"{key}: got {value}, expected {found[key]}")
    if problems:
        lines = "\n    ".join(problems)
        raise ConfigError(f"the fields differ from {config.path}; leave them out:\n    {lines}")
    return CompletedFields({**found, **given}, tuple(notes))


def check_family(family: Family, fields: Mapping[str, Any], head: Head) -> dict[str, Any]:
    """The config.json of a model with these fields, once it is sure that it describes the model.

    Args:
        family: whose format.
        fields: the flat Megatron fields.
        head: of the model.

    Raises:
        ConfigError: the family has no such models; lists what does not fit.
    """
    dtype = "bfloat16" if fields.get("bf16") else "float32"
    written = family.write_config(fields, head, dtype)
    read = family.read_fields(ModelConfigFile(Path("config.json"), written))
    defaults = {key: field.default for key, field in MODEL_FIELDS.items()} | _NEUTRAL
    problems = [
        f"{key}: the model has {fields.get(key, defaults.get(key))}, {family.name} {read.get(key)}"
        for key in (*_SHAPING, "swiglu", "rotary_base", "normalization")
        if not _agree(key, fields.get(key, defaults.get(key)), read.get(key, defaults.get(key)))
    ]
    if problems:
        lines = "\n    ".join(problems)
        raise ConfigError(
            f"the model is no {family.name}; known families: {', '.join(FAMILIES)}:\n    {lines}"
        )
    return written


def head_of(config: ModelConfigFile) -> Head:
    """The head that a folder's weights have.

    Raises:
        ConfigError: neither a language model's nor a sequence classifier's with one label.
    """
    architecture = config.architecture or ""
    if architecture.endswith("ForSequenceClassification"):
        if config.num_labels != 1:
            raise ConfigError(
                f"{config.path}: {architecture} with {config.num_labels} labels; a reward or value "
                "model has one"
            )
        return "scalar"
    if architecture and not architecture.endswith("ForCausalLM"):
        raise ConfigError(
            f"{config.path}: {architecture} is not supported; expected a class that ends in "
            "ForCausalLM or ForSequenceClassification"
        )
    return "lm"


def _check_head(config: ModelConfigFile, head: Head) -> list[str]:
    found = head_of(config)
    if found == head:
        return []
    if head == "lm":
        raise ConfigError(
            f"{config.path}: {config.architecture} has no language model's head, which this model "
            "needs: name a folder of a ForCausalLM class"
        )
    return [f"{config.architecture} has no head of one number: it starts at zero"]


def _is_neutral(key: str, value: Any) -> bool:
    if key in _NEUTRAL:
        return value is None or value == _NEUTRAL[key]
    if key == "rotary_percent":
        return value == 1.0
    return value is None or value is False


def _agree(key: str, one: Any, other: Any) -> bool:
    return _is_same(one, other) or (_is_neutral(key, one) and _is_neutral(key, other))


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, int | float) and isinstance(other, int | float):
        return abs(one - other) <= 1e-6 * max(abs(one), abs(other))
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(cast("list[Any]", one)) == list(cast("list[Any]", other))
    return one == other
