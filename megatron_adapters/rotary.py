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
    "Yarn",
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
        yarn: another scaling, of multi-latent attention; None: none.
    """

    base: float
    local_base: float | None = None
    scaling: Mapping[str, Any] | None = None
    yarn: "Yarn | None" = None

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
        scale = 1.0
        if self.yarn is not None:
            frequencies, scale = self.yarn.stretch(self.base, frequencies), self.yarn.turn_scale
        return RotaryTables(build_angles(frequencies, length).to(device), local, scale)


@dataclass(frozen=True)
class RotaryTables:
    """Angles of all positions, [length, pairs] float32.

    Attributes:
        angles: of layers without a sliding window.
        local: of those with one; None: the same.
        scale: factor of the cosines and sines (YaRN).
    """

    angles: torch.Tensor
    local: torch.Tensor | None
    scale: float = 1.0

    def turns_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of [tokens] positions, [tokens, 1, 1, pairs] each."""
        return _turns(self.angles[positions], self.scale)

    def local_turns_at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The same in layers with a sliding window; None: it is the same."""
        return None if self.local is None else _turns(self.local[positions], 1.0)


def _turns(angles: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = angles[:, None, None].cos(), angles[:, None, None].sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


@dataclass(frozen=True)
class Yarn:
    """YaRN: long waves are stretched, short ones are not, those between partly.

    Source: Peng et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4.

    Attributes:
        factor: by which the context grows.
        length: of the context that the model was first trained on.
        beta_fast: turns within that context of the shortest wave that is stretched.
        beta_slow: turns of the longest wave that is not wholly stretched.
        mscale: with `mscale_all_dim` the factor of cosines and sines.
        mscale_all_dim: see there; Megatron scales the scores by it, too.
    """

    factor: float
    length: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    @property
    def turn_scale(self) -> float:
        """Factor of cosines and sines."""
        return self._attention(self.mscale) / self._attention(self.mscale_all_dim)

    def stretch(self, base: float, frequencies: torch.Tensor) -> torch.Tensor:
        """The frequencies, [pairs] float32, of the longer context."""
        pairs = len(frequencies)

        def pair_of(turns: float) -> float:
            return 2 * pairs * math.log(self.length / (turns * 2 * math.pi)) / (2 * math.log(base))

        low = max(math.floor(pair_of(self.beta_fast)), 0)
        high = min(math.ceil(pair_of(self.beta_slow)), 2 * pairs - 1)
        width = high - low if high != low else 0.001
        share = ((torch.arange(pairs, dtype=torch.float32) - low) / width).clamp(0, 1)
        return frequencies / self.factor * share + frequencies * (1 - share)

    def _attention(self, scale: float) -> float:
        return 0.1 * scale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


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
