"""The token that a Ray cluster of this project asks for.

Ray's servers listen on every interface, so the token is the only door. A user may give one; else it
is made for the run, in a file that only the owner reads, and that goes with the process.
"""

from __future__ import annotations

import atexit
import importlib
import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chatlearn.errors import ConfigError

__all__ = ["agree_on_token", "prepare_token", "read_token"]

_MODE = "RAY_AUTH_MODE"
_TOKEN = "RAY_AUTH_TOKEN"
_TOKEN_FILE = "RAY_AUTH_TOKEN_PATH"
_TOKEN_FILE_S = 30.0


def prepare_token() -> None:
    """Turn Ray's token authentication on in this process and its children.

    The token is the user's, else a fresh one.

    Raises:
        ConfigError: authentication is switched off, or the user's token cannot be read.
    """
    _require_token_mode()
    if os.environ.get(_TOKEN, "").strip():
        return
    if not os.environ.get(_TOKEN_FILE):
        os.environ[_TOKEN_FILE] = str(_make_token_file())
        _let_ray_read_again()
    read_token(Path(os.environ[_TOKEN_FILE]))


def agree_on_token(*, is_driver: bool, is_alone: bool, timeout_s: float) -> bytes:
    """The token that all nodes share, and Ray told to ask for it.

    It is `RAY_AUTH_TOKEN`, else the file `RAY_AUTH_TOKEN_PATH`, else Ray's own
    `~/.ray/auth_token`, which the driver makes where it is missing and the others wait for (the
    home folder is then a shared one). A process that is alone makes one for itself.

    Raises:
        ConfigError: authentication is switched off, or there is no token.
    """
    _require_token_mode()
    given = os.environ.get(_TOKEN, "").strip()
    if given:
        return given.encode()
    if is_alone:
        prepare_token()
    elif not os.environ.get(_TOKEN_FILE):
        path = _default_token_file(is_driver=is_driver, timeout_s=timeout_s)
        os.environ[_TOKEN_FILE] = str(path)
    return read_token(Path(os.environ[_TOKEN_FILE]))


def read_token(path: Path) -> bytes:
    """The token in a file.

    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the token file {path} cannot be read: {error.strerror}") from error
    if not token:
        raise ConfigError(f"the token file {path} is empty")
    return token


def _require_token_mode() -> None:
    mode = os.environ.get(_MODE) or "token"
    if mode != "token":
        raise ConfigError(
            f"{_MODE}={mode}: Ray listens on every interface, so the cluster asks for a token; "
            f"unset {_MODE}"
        )
    os.environ[_MODE] = mode


def _make_token_file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="chatlearn-token-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    return path


def _let_ray_read_again() -> None:
    """Ray has read its settings when it was imported."""
    if "ray" in sys.modules:
        raylet: Any = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")


def _default_token_file(*, is_driver: bool, timeout_s: float) -> Path:
    path = Path.home() / ".ray" / "auth_token"
    if is_driver and not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent)) / "token"
        draft.touch(mode=0o600)
        draft.write_bytes(os.urandom(32).hex().encode())
        draft.replace(path)
        draft.parent.rmdir()
    deadline = time.monotonic() + min(timeout_s, _TOKEN_FILE_S)
    while not path.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no token: {path} is not there, so the home folder is not shared with rank 0. "
                f"Give every node the same {_TOKEN}, or the same file {_TOKEN_FILE} "
                "(`ray get-auth-token --generate` makes one)"
            )
        time.sleep(0.2)
    return path
