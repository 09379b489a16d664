"""Values that are saved and loaded without any code: tensors, numbers, texts, and containers."""

from __future__ import annotations

import os
import pickle
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import CheckpointError, explain_unwritten, in_one_line

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["load_plain", "save_plain", "to_plain"]

# A dict with this key alone stands for an array, and with the other for one of its numbers.
_ARRAY, _SCALAR = "chatlearn.numpy_array", "chatlearn.numpy_scalar"


def to_plain(value: Any, where: str) -> Any:
    """The value as plain as a file may hold it; subclasses become their bases.

    Arrays become tensors, of which `load_plain` makes arrays again.

    Args:
        value: to be saved.
        where: names it in messages.

    Raises:
        CheckpointError: something in it is neither tensor, array, number, text nor container.
    """
    import numpy as np
    import torch

    if value is None or isinstance(value, torch.Tensor):
        return value.detach() if value is not None else None
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.str_ | np.bytes_):
        return _to_tensor(value, where)
    kinds: tuple[Any, ...] = (bool, int, float, str, bytes)
    for kind in kinds:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        return {
            to_plain(key, where): to_plain(each, f"{where}[{key!r}]")
            for key, each in entries.items()
        }
    if isinstance(value, list | tuple):
        parts = [to_plain(each, f"{where}[{at}]") for at, each in enumerate(cast("Any", value))]
        return parts if isinstance(value, list) else tuple(parts)
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which cannot be saved: give tensors, arrays, "
        "numbers, texts, or lists, tuples and dicts of them"
    )


def _to_tensor(array: Any, where: str) -> dict[str, Any]:
    """What stands for an array, or for a number of numpy's."""
    import numpy as np
    import torch

    build = cast("Any", torch).from_numpy
    try:
        return {_ARRAY if array.ndim else _SCALAR: build(np.array(array, order="C"))}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where} is an array of {array.dtype}, which cannot be saved: {error}"
        ) from error


def save_plain(path: Path, value: Any, where: str) -> None:
    """Write a value that `to_plain` accepts; the file appears whole.

    Raises:
        CheckpointError: it is not plain, or the file cannot be written.
    """
    import torch

    plain = to_plain(value, where)
    draft = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(plain, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(explain_unwritten(path, error)) from error


def load_plain(path: Path, device: Any = "cpu") -> Any:
    """Read what `save_plain` wrote, without running code from the file.

    Args:
        path: of the file.
        device: where tensors go.

    Raises:
        CheckpointError: it is missing, damaged, or holds something else.
    """
    import torch

    try:
        return _with_arrays(torch.load(path, map_location=device, weights_only=True))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be loaded: it is damaged, or holds more than tensors and numbers"
        ) from error
    except Exception as error:  # a damaged file raises anything
        raise CheckpointError(f"{path} cannot be loaded: {in_one_line(error)}") from error


def _with_arrays(value: Any) -> Any:
    """Arrays in the place of what `to_plain` made of them; containers are changed in place."""
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        if len(entries) == 1 and (_ARRAY in entries or _SCALAR in entries):
            (kind,) = entries
            array: Any = entries[kind].cpu().numpy()
            return array if kind == _ARRAY else array[()]
        for key, each in entries.items():
            entries[key] = _with_arrays(each)
    elif isinstance(value, list):
        rows = cast("list[Any]", value)
        rows[:] = [_with_arrays(each) for each in rows]
    elif type(value) is tuple:  # pyright: ignore[reportUnknownArgumentType]
        return tuple(_with_arrays(each) for each in cast("tuple[Any, ...]", value))
    return cast("Any", value)
