"""What `rope_scaling` of a model may say. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["check_rope_scaling"]

_KEYS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def check_rope_scaling(path: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """One line for each thing that is wrong with it; `path` is `models.<name>`."""
    found = fields.get("rope_scaling")
    if not isinstance(found, dict):
        return
    scaling = cast("dict[str, Any]", found)
    key = f"{path}.rope_scaling"
    kind = scaling.get("rope_type")
    if kind not in _KEYS:
        yield f"{key}: rope_type is {kind!r}, expected {' or '.join(_KEYS)}"
        return
    wanted = _KEYS[kind]
    for name in wanted:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            yield f"{key}: {name} is {value!r}, expected a number above 0"
            return
    unknown = sorted(set(scaling) - {"rope_type", *wanted})
    if unknown:
        yield f"{key}: {', '.join(unknown)} means nothing with rope_type {kind}"
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        yield f"{key}: low_freq_factor must be less than high_freq_factor"
