"""Calls a module's method the way a flow asks for it, inside a worker."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from chatlearn.errors import ChatLearnError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatlearn.models.base import BaseModule

__all__ = ["invoke", "invoke_prepare_episode"]


def invoke(
    module: BaseModule,
    method_name: str,
    data: Any,
    *,
    row_ids: Any,
    iteration: int,
    constants: Mapping[str, Any],
) -> Any:
    """`module.method_name(data, **constants)`, with `iteration` where the method takes it.

    Args:
        module: the model.
        method_name: a public method.
        data: columns (or, for `train_step`, a list of them).
        row_ids: ids of the rows, nested like `data`; the module sees them as `self.row_ids`.
        iteration: how many calls of this kind came before.
        constants: keyword arguments that the flow gave.
    """
    method = getattr(module, method_name, None)
    if not callable(method):
        raise ChatLearnError(f"model {module.name!r} has no method {method_name!r}")
    named = dict(constants)
    if "iteration" in inspect.signature(method).parameters:
        named.setdefault("iteration", iteration)
    module.row_ids, module.iteration = row_ids, iteration
    try:
        return method(data, **named)
    finally:
        module.row_ids = ()


def invoke_prepare_episode(
    module: BaseModule, batches: list[list[dict[str, Any]]], row_ids: Any
) -> None:
    """`module.prepare_episode(batches)` with the rows' ids in `module.row_ids`."""
    module.row_ids = row_ids
    try:
        module.prepare_episode(batches)
    finally:
        module.row_ids = ()
