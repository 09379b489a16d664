# pyright: standard, reportPrivateImportUsage=false
"""Rotary angles by position, read from Megatron's module without being kept by it.

`RotaryEmbedding.forward` of Megatron-Core 0.16 is a cached method: its cache keeps the last 32
modules alive, and with each the process group and the threads of a world that is long gone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "RotaryOptions",
    "RotaryTables",
    "build_angles",
    "build_doubled_angles",
    "scale_frequencies",
]


@dataclass(frozen=True)
class RotaryOptions:
    """What a model wants beyond Megatron's rotary positions.

    Attributes:
        base: of the frequencies.
        local_base: in layers with a sliding window; None: the same as elsewhere.
        scaling: of the frequencies in the other layers, see `scale_frequencies`; None: none.
    """

    base: float
    local_base: float | None = None
    scaling: Mapping[str, Any] | None = None

    def build_tables(self, size: int, length: int, device: torch.device) -> "RotaryTables":
        """The angles of all positions.

        Args:
            size: elements of a head that are turned.
            length: positions.
            device: where they lie.
        """
        frequencies = build_frequencies(self.base, size)
        if self.scaling is not None:
            frequencies = scale_frequencies(frequencies, self.scaling)
        local = None
        if self.local_base is not None:
            local = build_angles(build_frequencies(self.local_base, size), length).to(device)
        return RotaryTables(build_angles(frequencies, length).to(device), local)


@dataclass(frozen=True)
class RotaryTables:
    """Angles of all positions, [length, pairs] float32.

    Attributes:
        angles: of layers without a sliding window.
        local: of those with one; None: the same.
    """

    angles: torch.Tensor
    local: torch.Tensor | None


def build_frequencies(base: float, size: int) -> torch.Tensor:
    """[size / 2] float32: base ** (-2 i / size).

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    steps = torch.arange(0, size, 2, dtype=torch.int64).float() / size
    return 1.0 / (base**steps)


def scale_frequencies(frequencies: torch.Tensor, scaling: Mapping[str, Any]) -> torch.Tensor:
    """Frequencies of longer contexts than a model was first trained on.

    `linear` divides all by `factor` (Chen et al. 2023, arXiv:2306.15595). `llama3` divides those
    of long waves, leaves those of short ones, and blends in between (Grattafiori et al. 2024,
    arXiv:2407.21783, and Meta's reference code).

    Args:
        frequencies: [pairs] float32.
        scaling: `rope_type` and what belongs to it.
    """
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return frequencies / factor
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    length = float(scaling["original_max_position_embeddings"])
    waves = 2 * math.pi / frequencies
    share = (length / waves - low) / (high - low)
    blended = (1 - share) * frequencies / factor + share * frequencies
    scaled = torch.where(waves > length / low, frequencies / factor, frequencies)
    is_between = (waves >= length / high) & (waves <= length / low)
    return torch.where(is_between, blended, scaled)


def build_angles(frequencies: torch.Tensor, length: int) -> torch.Tensor:
    """[length, pairs] float32: the angle of each pair of a head's elements at each position."""
    positions = torch.arange(length, device=frequencies.device, dtype=torch.float32)
    return torch.outer(positions, frequencies.float())


def build_doubled_angles(angles: torch.Tensor, *, is_interleaved: bool) -> torch.Tensor:
    """[length, 2 * pairs] float32: the angle of each element, as Megatron's layers take them."""
    if is_interleaved:
        return angles.repeat_interleave(2, dim=-1)
    return torch.cat([angles, angles], dim=-1)
