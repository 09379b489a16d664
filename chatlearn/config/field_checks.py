"""Values of a Megatron model's fields that cannot work, or would change results in silence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from chatlearn.config.schema import ModelConfig

__all__ = ["find_bad_fields"]

# Fields that the adapters do not carry out, with what to do instead.
_NOT_YET = {
    "calculate_per_token_loss": "losses are already means over the global batch's tokens",
    "embedding_init_method_std": "use init_method_std",
    "experimental_attention_variant": "leave it out",
    "fp4": "use bf16",
    "fp8": "use bf16",
    "fp16": "use bf16",
    "mtp_num_layers": "leave it out",
    "multi_latent_attention": "leave it out",
    "overlap_param_gather": "weight sync must see whole parameters; leave it out",
    "qk_clip": "leave it out",
    "qk_l2_norm": "use qk_layernorm",
    "rotary_scaling_factor": "use rotary_base",
    "use_megatron_fsdp": "use use_distributed_optimizer",
}
_CHOICES = {
    "lr_decay_style": ("constant", "linear", "cosine", "inverse-square-root", "WSD"),
    "lr_wsd_decay_style": ("linear", "cosine", "exponential", "minus_sqrt"),
    "normalization": ("RMSNorm", "LayerNorm"),
    "optimizer": ("adam", "sgd"),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "recompute_granularity": ("full", "selective"),
}
_POSITIVE = (
    "ffn_hidden_size",
    "hidden_size",
    "kv_channels",
    "max_sequence_length",
    "num_attention_heads",
    "num_layers",
    "num_moe_experts",
    "num_query_groups",
    "vocab_size",
)
_NOT_NEGATIVE = ("clip_grad", "lr", "lr_warmup_steps", "min_lr", "weight_decay")
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
    for key, remedy in _NOT_YET.items():
        if fields.get(key):
            yield f"{path}: {key} is not supported yet: {remedy}"
    if fields.get("perform_initialization") is False:
        yield f"{path}: perform_initialization=false breaks the gradient norm: leave it out"
    for key, choices in _CHOICES.items():
        value = fields.get(key)
        if value is not None and value not in choices:
            yield f"{path}.{key}: got {value!r}, expected one of {', '.join(choices)}"
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = fields.get(key)
        least = 1 if key in _POSITIVE else 0
        if isinstance(value, int | float) and value < least:
            yield f"{path}.{key}: got {value}, expected {least} or more"
    if model.module is not None and model.module.startswith("megatron_adapters"):
        missing = [key for key in _REQUIRED if fields.get(key) is None]
        if missing:
            yield f"{path}: a Megatron model needs {', '.join(missing)}"
    yield from _check_schedule(path, fields)


def _check_schedule(path: str, fields: Mapping[str, Any]) -> Iterator[str]:
    style = fields.get("lr_decay_style") or "constant"
    warmup, steps = fields.get("lr_warmup_steps") or 0, fields.get("lr_decay_steps")
    if steps is not None and warmup >= steps:
        yield f"{path}: lr_warmup_steps={warmup} is not less than lr_decay_steps={steps}"
    if style != "constant" and steps is None:
        yield f"{path}: lr_decay_style={style} needs lr_decay_steps"
    if style == "WSD" and fields.get("lr_wsd_decay_steps") is None:
        yield f"{path}: lr_decay_style=WSD needs lr_wsd_decay_steps"
