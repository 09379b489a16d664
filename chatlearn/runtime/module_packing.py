"""Pickles a user's module for its workers."""

from __future__ import annotations

from typing import Any, cast

from chatlearn.errors import ConfigError

__all__ = ["pack_module"]


def pack_module(model_name: str, module: Any) -> bytes:
    """The module as every worker of the model will get it.

    Raises:
        ConfigError: it cannot be pickled; names the model and the attribute.
    """
    try:
        return _dumps(module)
    except Exception as error:  # noqa: BLE001 - pickling runs the user's code
        attribute = _find_attribute(module)
        where = f", because of its attribute {attribute!r}" if attribute else ""
        raise ConfigError(
            f"model {model_name!r} cannot be sent to its workers{where}: "
            f"{type(error).__name__}: {error}. Make such things in setup(), which runs in the "
            "workers, not in the constructor"
        ) from error


def _find_attribute(module: Any) -> str | None:
    for name, value in cast("dict[str, Any]", vars(module)).items():
        try:
            _dumps(value)
        except Exception:  # noqa: BLE001 - pickling runs the user's code
            return name
    return None


def _dumps(value: object) -> bytes:
    from ray import cloudpickle

    pickler: Any = cloudpickle
    return pickler.dumps(value)
