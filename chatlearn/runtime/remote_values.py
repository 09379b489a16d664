"""Finds remote values within the arguments of a call, and puts their values in their place."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

from chatlearn.runtime.contract import RemoteValue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["resolve_arguments"]


def resolve_arguments(
    arguments: Sequence[Any], fetch: Callable[[list[Any]], list[Any]]
) -> tuple[Any, ...]:
    """The arguments with every RemoteValue replaced, fetched in one go.

    Looks into lists, tuples, dicts and dataclass records.

    Args:
        arguments: of one call.
        fetch: gives the values of a list of handles.
    """
    handles: dict[int, Any] = {}
    _collect(tuple(arguments), handles)
    values = dict(zip(handles, fetch(list(handles.values())), strict=True)) if handles else {}
    return _replace(tuple(arguments), values) if values else tuple(arguments)


def _parts(value: Any) -> list[Any]:
    if type(value) in (list, tuple):
        return list(cast("list[Any]", value))
    if type(value) is dict:
        return list(cast("dict[Any, Any]", value).values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return []


def _collect(value: Any, handles: dict[int, Any]) -> None:
    if isinstance(value, RemoteValue):
        handles[id(value)] = value.handle
        return
    for part in _parts(value):
        _collect(part, handles)


def _replace(value: Any, values: dict[int, Any]) -> Any:
    if isinstance(value, RemoteValue):
        return values[id(value)]
    parts = _parts(value)
    if not parts:
        return value
    replaced = [_replace(part, values) for part in parts]
    if all(new is old for new, old in zip(replaced, parts, strict=True)):
        return value
    if type(value) in (list, tuple):
        return type(value)(replaced)
    if type(value) is dict:
        return dict(zip(cast("dict[Any, Any]", value), replaced, strict=True))
    names = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(value, **dict(zip(names, replaced, strict=True)))
