"""Kinds and sizes of a Megatron model's flat fields, wherever they come from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.config.megatron_fields import MEGATRON_FIELDS
from chatlearn.config.model_fields import MODEL_FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

__all__ = ["FIELD_KINDS", "describe_wrong_kind", "find_bad_sizes", "find_wrong_kinds", "is_kind"]

_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
    "list": (list, tuple),
    "dict": (dict,),
}
FIELD_KINDS: Mapping[str, Sequence[str]] = {
    **{name: kinds for group in MEGATRON_FIELDS.values() for name, kinds in group.items()},
    **{name: field.kinds for name, field in MODEL_FIELDS.items()},
}
_POSITIVE = (
    "ffn_hidden_size",
    "hidden_size",
    "kv_channels",
    "max_sequence_length",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "num_attention_heads",
    "num_layers",
    "num_moe_experts",
    "num_query_groups",
    "recompute_num_layers",
    "vocab_size",
)
_NOT_NEGATIVE = (
    "adam_eps",
    "clip_grad",
    "init_method_std",
    "layernorm_epsilon",
    "lr",
    "lr_warmup_steps",
    "min_lr",
    "weight_decay",
)
# Beyond these nothing is planned: such a number is a slip, or comes from a damaged file.
_MOST = 2**31
_MOST_OF = {"num_layers": 10_000, "num_moe_experts": 10_000}


def is_kind(value: Any, kinds: Sequence[str]) -> bool:
    """Whether a value is of one of the kinds; null always is."""
    if value is None:
        return True
    if isinstance(value, bool):
        return "bool" in kinds
    return any(isinstance(value, _TYPES[kind]) for kind in kinds)


def describe_wrong_kind(path: str, value: Any, kinds: Sequence[str]) -> str:
    """A line on a value that is of none of the kinds."""
    return f"{path}: got {value!r} ({type(value).__name__}), expected {' or '.join(kinds)}"


def find_wrong_kinds(fields: Mapping[str, Any]) -> Iterator[str]:
    """A line for each known field whose value is of another kind."""
    for key, value in fields.items():
        if key in FIELD_KINDS and not is_kind(value, FIELD_KINDS[key]):
            yield describe_wrong_kind(key, value, FIELD_KINDS[key])


def find_bad_sizes(fields: Mapping[str, Any]) -> Iterator[str]:
    """A line for each number that no model has; values of the right kinds are taken for granted."""
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = fields.get(key)
        least = 1 if key in _POSITIVE else 0
        most = _MOST_OF.get(key, _MOST)
        if isinstance(value, int | float) and value < least:
            yield f"{key}: got {value}, expected {least} or more"
        if isinstance(value, int) and value > most:
            yield f"{key}: got {value}, expected {most} or less"
