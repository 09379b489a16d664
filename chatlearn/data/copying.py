"""Copies of row values that share nothing with the original."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

__all__ = ["copy_tensor", "copy_value"]

_IMMUTABLE = frozenset({int, float, complex, bool, str, bytes, type(None)})


def copy_value(value: Any) -> Any:
    """The value with everything in it copied, so that either owner may change its own.

    Tensors come without their graph, on the CPU. Containers are copied entry by entry, which is
    many times faster than `deepcopy` for long lists of numbers.

    Raises:
        TypeError: something in it cannot be copied, a lock or an open file for example.
    """
    import numpy as np
    import torch

    kind = cast("type[Any]", type(value))
    if kind in _IMMUTABLE:
        return value
    if kind in (list, tuple):
        build = cast("Any", kind)
        return build([v if type(v) in _IMMUTABLE else copy_value(v) for v in value])
    if kind is dict:
        return {key: copy_value(each) for key, each in value.items()}
    if isinstance(value, torch.Tensor):
        return copy_tensor(value)
    array: Any = value
    if isinstance(value, np.generic):
        return array
    if isinstance(value, np.ndarray) and not array.dtype.hasobject:
        return array.copy()
    return deepcopy(array)


def copy_tensor(tensor: Any) -> Any:
    """The tensor on the CPU, detached, in memory of its own."""
    detached = tensor.detach()
    # From another device `cpu` copies already.
    return detached.clone() if detached.device.type == "cpu" else detached.cpu()
