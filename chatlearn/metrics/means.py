"""Means over columns of rows. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["mean_of_numbers"]


def mean_of_numbers(values: Iterable[Any]) -> float | None:
    """Mean of numbers or scalar tensors; None where there are none, or one is something else."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        return None
    return math.fsum(numbers) / len(numbers) if numbers else None
