"""Which layers of a mixture-of-experts model have experts. Pure."""

from __future__ import annotations

from typing import Any

from chatlearn.errors import ConfigError

__all__ = ["find_expert_layers"]


def find_expert_layers(moe_layer_freq: Any, num_layers: int) -> tuple[bool, ...]:
    """For each layer of a mixture-of-experts model, whether it has experts.

    Args:
        moe_layer_freq: every how many layers there is one, from the first on; or a list with 1
            for a layer with experts and 0 for a dense one.
        num_layers: of the model.

    Raises:
        ConfigError: the number is less than 1, or the list has another length, or neither 0 nor 1
            in it.
    """
    if not isinstance(moe_layer_freq, list | tuple):
        if int(moe_layer_freq) < 1:
            raise ConfigError(f"moe_layer_freq: got {moe_layer_freq}, expected 1 or more")
        return tuple(number % int(moe_layer_freq) == 0 for number in range(num_layers))
    pattern: list[Any] = list(moe_layer_freq)  # pyright: ignore[reportUnknownArgumentType]
    if len(pattern) != num_layers or not set(pattern) <= {0, 1}:
        raise ConfigError(
            f"moe_layer_freq: got {pattern}, expected {num_layers} numbers (num_layers), 1 for a "
            "layer with experts and 0 for a dense one"
        )
    return tuple(flag == 1 for flag in pattern)
