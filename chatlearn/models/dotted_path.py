"""The one dynamic import: an object named in the config as `package.module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from chatlearn.errors import ConfigError

__all__ = ["load_object"]


def load_object(path: str, key: str) -> Any:
    """The object that `path` names.

    Args:
        path: `package.module:name`; the module is found on the usual import path.
        key: the config key that holds the path, for messages.

    Raises:
        ConfigError: not of that form, no such module, or no such name in it.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise ConfigError(f"{key}: expected `package.module:name`, got {path!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{key}: module {module_name!r} cannot be imported: {error}. Is its folder on "
            "PYTHONPATH, and its package installed?"
        ) from error
    except Exception as error:  # noqa: BLE001 - whatever the user's module raises
        raise ConfigError(
            f"{key}: module {module_name!r} fails when it is imported: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise ConfigError(f"{key}: module {module_name!r} has no {name!r}")
    return getattr(module, name)
