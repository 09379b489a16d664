# pyright: standard, reportPrivateImportUsage=false
"""Rotary angles by position, read from Megatron's module without being kept by it.

`RotaryEmbedding.forward` of Megatron-Core 0.16 is a cached method: its cache keeps the last 32
modules alive, and with each the process group and the threads of a world that is long gone.
"""

from typing import Any

import torch

__all__ = ["build_angles", "build_doubled_angles"]


def build_angles(rotary: Any, length: int) -> torch.Tensor:
    """[length, pairs] float32: the angle of each pair of a head's elements at each position."""
    return rotary.get_freqs_non_repeated(length).float()


def build_doubled_angles(rotary: Any, length: int, *, is_interleaved: bool) -> torch.Tensor:
    """[length, 2 * pairs] float32: the angle of each element, as Megatron's layers take them."""
    angles = build_angles(rotary, length)
    if is_interleaved:
        return angles.repeat_interleave(2, dim=-1)
    return torch.cat([angles, angles], dim=-1)
