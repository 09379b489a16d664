# pyright: standard, reportPrivateImportUsage=false
"""Puts adapted linear layers into a layer's spec."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

from megatron_adapters.lora.layers import AdapterOptions, LoraColumn, LoraRow, Target

__all__ = ["ALL_TARGETS", "adapt_layers", "find_targets"]

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapt_layers(
    spec: Any, config: Any, lora: AdapterOptions, target_modules: Collection[str]
) -> None:
    """Replace the linear layers below a spec that have one of the targets.

    Args:
        spec: of a decoder layer, built of Megatron's own linear layers.
        config: Megatron's TransformerConfig.
        lora: of all adapters.
        target_modules: PEFT's names.
    """
    heads = config.num_attention_heads // config.num_query_groups
    chosen = frozenset(target_modules)
    makers: dict[str, Any] = {
        "linear_qkv": partial(_qkv_targets, chosen, heads, config.kv_channels),
        "linear_fc1": partial(_gated_targets, chosen, is_gated=config.gated_linear_unit),
        "linear_proj": partial(_whole_target, chosen, "o_proj"),
        "linear_fc2": partial(_whole_target, chosen, "down_proj"),
    }
    _replace(spec, lora, makers)


def find_targets(
    key: str, fields: Mapping[str, Any], num_rows: int
) -> dict[str, tuple[tuple[int, int], ...]]:
    """The parts of a whole weight that may have adapters, and their rows.

    Args:
        key: Megatron's name of the weight.
        fields: the flat Megatron fields of the model.
        num_rows: of the weight.
    """
    heads = int(fields["num_attention_heads"])
    groups = int(fields.get("num_query_groups") or heads)
    size = int(fields.get("kv_channels") or int(fields["hidden_size"]) // heads)
    is_gated = bool(fields.get("gated_linear_unit") or fields.get("swiglu", True))
    found: tuple[Target, ...] = ()
    if key.endswith("linear_qkv.weight"):
        found = _qkv_targets(ALL_TARGETS, heads // groups, size, num_rows)
    elif key.endswith("linear_fc1.weight"):
        found = _gated_targets(ALL_TARGETS, num_rows, is_gated=is_gated)
    elif key.endswith("linear_proj.weight"):
        found = _whole_target(ALL_TARGETS, "o_proj", num_rows)
    elif key.endswith("linear_fc2.weight"):
        found = _whole_target(ALL_TARGETS, "down_proj", num_rows)
    return {target.name: target.rows for target in found}


def _replace(spec: Any, lora: AdapterOptions, makers: dict[str, Any]) -> None:
    from megatron.core.transformer.spec_utils import ModuleSpec

    parts = getattr(spec, "submodules", None)
    if parts is None:
        return
    for name, inner in vars(parts).items():
        if name in makers:
            kind = LoraColumn if name in ("linear_qkv", "linear_fc1") else LoraRow
            params = {"lora": lora, "targets": makers[name]}
            setattr(parts, name, ModuleSpec(module=kind, params=params))
        else:
            _replace(inner, lora, makers)


def _qkv_targets(
    chosen: Collection[str], heads: int, size: int, num_rows: int
) -> tuple[Target, ...]:
    """For each group its query heads, its key and its value."""
    group = (heads + 2) * size
    starts = range(0, num_rows, group)
    query = tuple((at, at + heads * size) for at in starts)
    key = tuple((at + heads * size, at + (heads + 1) * size) for at in starts)
    value = tuple((at + (heads + 1) * size, at + group) for at in starts)
    found = (Target("q_proj", query), Target("k_proj", key), Target("v_proj", value))
    return tuple(target for target in found if target.name in chosen)


def _gated_targets(chosen: Collection[str], num_rows: int, *, is_gated: bool) -> tuple[Target, ...]:
    if not is_gated:
        return _whole_target(chosen, "up_proj", num_rows)
    half = num_rows // 2
    found = (Target("gate_proj", ((0, half),)), Target("up_proj", ((half, num_rows),)))
    return tuple(target for target in found if target.name in chosen)


def _whole_target(chosen: Collection[str], name: str, num_rows: int) -> tuple[Target, ...]:
    return (Target(name, ((0, num_rows),)),) if name in chosen else ()
