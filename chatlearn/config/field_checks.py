"""Values of a Megatron model's fields that cannot work, or would change results in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.config.expert_layers import find_expert_layers
from chatlearn.config.field_kinds import find_bad_sizes
from chatlearn.config.refused_fields import find_refused_fields, why_refused
from chatlearn.config.rope_scaling import check_rope_scaling
from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chatlearn.config.schema import ModelConfig

__all__ = ["find_bad_fields"]

_CHOICES = {
    "activation": ("silu", "gelu", "gelu_tanh"),
    "lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "lr_wsd_decay_style": ("linear", "cosine", "exponential", "minus_sqrt"),
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
    "normalization": ("RMSNorm", "LayerNorm"),
    "optimizer": ("adam", "sgd"),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "recompute_granularity": ("full", "selective"),
    "recompute_method": ("uniform", "block"),
}
_BELOW_ONE = ("adam_beta1", "adam_beta2", "attention_dropout", "hidden_dropout")
# Megatron-Core 0.16.1's default.
_MEGATRON_TOPK = 2
_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "max_sequence_length",
)


def find_bad_fields(path: str, model: ModelConfig) -> Iterator[str]:
    """One line for each field that cannot be; `path` is `models.<name>`."""
    fields: Mapping[str, Any] = model.megatron
    yield from find_refused_fields(path, fields)
    for key, choices in _CHOICES.items():
        value = fields.get(key)
        if value is not None and value not in choices:
            yield f"{path}.{key}: got {value!r}, expected one of {', '.join(choices)}"
    for line in find_bad_sizes(fields):
        yield f"{path}.{line}"
    for key in _BELOW_ONE:
        value = fields.get(key)
        if value is not None and not 0 <= value < 1:
            yield f"{path}.{key}: got {value}, expected 0 or more and less than 1"
    # A pretrained model's fields come from its folder.
    is_named = model.module is not None and model.module.startswith("megatron_adapters")
    if is_named and model.pretrained is None:
        missing = [key for key in _REQUIRED if fields.get(key) is None]
        if missing:
            yield f"{path}: a Megatron model needs {', '.join(missing)}"
    yield from _check_schedule(path, fields)
    yield from _check_rotation(path, fields)
    yield from check_rope_scaling(path, fields)
    if fields.get("activation") and fields.get("swiglu") and fields["activation"] != "silu":
        yield (
            f"{path}: swiglu has the activation silu, got activation={fields['activation']}: set "
            "swiglu: false and gated_linear_unit: true"
        )
    yield from _check_experts(path, fields)
    yield from _check_recompute(path, fields)


def _check_schedule(path: str, fields: Mapping[str, Any]) -> Iterator[str]:
    style = fields.get("lr_decay_style") or "constant"
    warmup, steps = fields.get("lr_warmup_steps") or 0, fields.get("lr_decay_steps")
    if steps is not None and warmup >= steps:
        yield f"{path}: lr_warmup_steps={warmup} is not less than lr_decay_steps={steps}"
    if style != "constant" and steps is None:
        yield f"{path}: lr_decay_style={style} needs lr_decay_steps"
    if style == "WSD" and fields.get("lr_wsd_decay_steps") is None:
        yield f"{path}: lr_decay_style=WSD needs lr_wsd_decay_steps"


def _check_rotation(path: str, fields: Mapping[str, Any]) -> Iterator[str]:
    if (fields.get("position_embedding_type") or "rope") != "rope":
        return
    share = fields.get("rotary_percent")
    share = 1.0 if share is None else share
    if not 0 < share <= 1:
        yield f"{path}.rotary_percent: got {share}, expected more than 0 and at most 1"
        return
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    size = fields.get("kv_channels") or (hidden // heads if heads and hidden else None)
    if size and (int(size * share) % 2 or int(size * share) < 1):
        yield (
            f"{path}: rope turns pairs of numbers, and kv_channels x rotary_percent = {size} x "
            f"{share:g} = {int(size * share)} is not even: change kv_channels (unset: hidden_size "
            "/ num_attention_heads) or position_embedding_type"
        )


def _check_experts(path: str, fields: Mapping[str, Any]) -> Iterator[str]:
    experts = fields.get("num_moe_experts")
    if not experts:
        for key in fields:
            if key.startswith("moe_") and fields[key] and why_refused(key) is None:
                yield f"{path}: {key} needs num_moe_experts"
        return
    chosen = fields.get("moe_router_topk")
    chosen = _MEGATRON_TOPK if chosen is None else chosen
    if chosen > experts:
        yield f"{path}: moe_router_topk={chosen} is more than num_moe_experts={experts}"
    layers = fields.get("num_layers")
    if layers:
        frequency = fields.get("moe_layer_freq")
        try:
            find_expert_layers(1 if frequency is None else frequency, layers)
        except ConfigError as error:
            yield f"{path}: {error}"


def _check_recompute(path: str, fields: Mapping[str, Any]) -> Iterator[str]:
    granularity = fields.get("recompute_granularity")
    method, count = fields.get("recompute_method"), fields.get("recompute_num_layers")
    if granularity == "full" and (method is None or count is None):
        yield (
            f"{path}: recompute_granularity=full needs recompute_method (uniform or block) and "
            "recompute_num_layers"
        )
    if granularity != "full" and (method is not None or count is not None):
        yield (
            f"{path}: recompute_method and recompute_num_layers need recompute_granularity=full, "
            f"got {granularity}"
        )
    if granularity == "full" and fields.get("recompute_modules"):
        yield f"{path}: recompute_modules needs recompute_granularity=selective, got full"
    if fields.get("distribute_saved_activations") and fields.get("sequence_parallel"):
        yield f"{path}: distribute_saved_activations and sequence_parallel exclude each other"
