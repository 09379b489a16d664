"""Random numbers that are a pure function of a seed and counters.

A number depends on nothing else: not on the device, the batch, the order of calls, or the rank.
The hash is the finaliser of splitmix64 (Steele, Lea, Flood 2014), applied once per counter, in
wrapping int64 arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["counter_normal", "counter_uniform", "stable_hash"]

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
# With 53 bits the largest number plus a half would round to 1.
_BITS = 52


def stable_hash(text: str) -> int:
    """A 63-bit number for a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def counter_uniform(seed: int, *counters: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in the open interval (0, 1).

    Args:
        seed: any integer.
        counters: int64 tensors that broadcast against each other; one number for each
            combination.

    Returns:
        float64, of the broadcast shape.
    """
    import torch

    bits = _shift_right(_hash(seed, *counters), 64 - _BITS)
    return (bits.to(torch.float64) + 0.5) * 2.0**-_BITS


def counter_normal(seed: int, *counters: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers (Box and Muller 1958); float64, shaped like `counter_uniform`."""
    radius = (-2.0 * counter_uniform(2 * seed, *counters).log()).sqrt()
    return radius * (2.0 * math.pi * counter_uniform(2 * seed + 1, *counters)).cos()


def _hash(seed: int, *counters: torch.Tensor) -> torch.Tensor:
    import torch

    if not counters:
        raise ValueError("counter-based random numbers need at least one counter")
    state = torch.tensor(_signed(_mix_int(seed + _GOLDEN)), device=counters[0].device)
    for counter in counters:
        state = _mix((state + counter.to(torch.int64)) * _signed(_GOLDEN) + _signed(_MIX_1))
    return state


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = (value ^ _shift_right(value, 30)) * _signed(_MIX_1)
    value = (value ^ _shift_right(value, 27)) * _signed(_MIX_2)
    return value ^ _shift_right(value, 31)


def _mix_int(value: int) -> int:
    mask = (1 << 64) - 1
    value &= mask
    value = ((value ^ (value >> 30)) * _MIX_1) & mask
    value = ((value ^ (value >> 27)) * _MIX_2) & mask
    return value ^ (value >> 31)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: int64's own shift copies the sign bit."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >= 1 << 63 else value
