"""Secrets of a run, known by their names, and kept out of what is written down.

What is written in the place of a secret is `${NAME}`, so that a written config reads back where
the environment has it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any, cast

__all__ = ["find_secrets", "hide_in_config", "hide_secrets", "is_secret_variable"]

_SHORTEST = 8
_WORDS = {
    "APIKEY", "CREDENTIAL", "CREDENTIALS", "KEY", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD",
    "PAT", "PWD", "SECRET", "TOKEN",
}  # fmt: skip
# The shell's name of the current folder.
_CURRENT_FOLDER = "PWD"
# What such variables say besides the secret itself.
_ABOUT = {"DIR", "FILE", "FOLDER", "LENGTH", "MODE", "NAME", "PATH", "TYPE"}
# Keys of options; a `token` alone is one of a vocabulary, and a `key` alone anything.
_OPTION = re.compile(
    r"(?:^|_)(?:api_?key|access_key|secret_key|private_key|secret|password|passwd|passphrase|"
    r"(?:access|api|auth|bearer|hf|hub|secret)_token)$",
    re.IGNORECASE,
)


def is_secret_variable(name: str) -> bool:
    """Whether an environment variable of this name holds a secret."""
    words = re.split(r"[^A-Z0-9]+", name.upper())
    is_named_so = not _WORDS.isdisjoint(words) and words[-1] not in _ABOUT
    return is_named_so and name.upper() != _CURRENT_FOLDER


def find_secrets(content: Any = None) -> dict[str, str]:
    """Secrets of this process's environment, and of a config's content, with their names.

    Args:
        content: sections of a config, raw or typed, as plain mappings.

    Returns:
        Names by values. Very short values are none: they occur in other texts.
    """
    found = {value: name for name, value in os.environ.items() if is_secret_variable(name)}
    _collect(content, found, is_environment=False)
    return {value: name for value, name in found.items() if len(value) >= _SHORTEST}


def hide_secrets(text: str, secrets: Mapping[str, str] | None = None) -> str:
    """The text with the names of secrets in the place of their values.

    Args:
        text: for a log, a file or a message.
        secrets: from `find_secrets`; None: those of the environment.
    """
    known = find_secrets() if secrets is None else secrets
    for value in sorted(known, key=len, reverse=True):
        for form in (value, repr(value)[1:-1]):
            text = text.replace(form, f"${{{known[value]}}}")
    return text


def hide_in_config(content: Any) -> Any:
    """The content of a config without its secrets, and without those of the environment."""
    return _hide(content, find_secrets(content), is_environment=False)


def _is_secret(key: str, *, is_environment: bool) -> bool:
    return is_secret_variable(key) if is_environment else _OPTION.search(key) is not None


def _collect(content: Any, found: dict[str, str], *, is_environment: bool) -> None:
    if isinstance(content, list | tuple):
        for entry in cast("list[Any]", content):
            _collect(entry, found, is_environment=False)
    if not isinstance(content, Mapping):
        return
    for key, value in cast("Mapping[Any, Any]", content).items():
        if isinstance(value, str | int | float) and _is_secret(
            str(key), is_environment=is_environment
        ):
            found.setdefault(str(value), str(key).upper())
        else:
            _collect(value, found, is_environment=key == "env_vars")


def _hide(content: Any, secrets: Mapping[str, str], *, is_environment: bool) -> Any:
    if isinstance(content, str):
        return hide_secrets(content, secrets)
    if isinstance(content, list | tuple):
        return [_hide(entry, secrets, is_environment=False) for entry in cast("list[Any]", content)]
    if not isinstance(content, Mapping):
        return content
    hidden: dict[Any, Any] = {}
    for key, value in cast("Mapping[Any, Any]", content).items():
        is_leaf = isinstance(value, str | int | float) and not isinstance(value, bool)
        if is_leaf and value != "" and _is_secret(str(key), is_environment=is_environment):
            name = secrets.get(str(value), str(key).upper())
            hidden[key] = f"${{{name}}}"
        else:
            hidden[key] = _hide(value, secrets, is_environment=key == "env_vars")
    return hidden
