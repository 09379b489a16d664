"""The token of a cluster that this project starts."""

import os
import shutil
import stat
from pathlib import Path

import pytest

from chatlearn.errors import ConfigError
from chatlearn.runtime.ray_token import agree_on_token, prepare_token


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """A process's environment without a word on tokens."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", found)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    yield found
    made = Path(found.get("RAY_AUTH_TOKEN_PATH", ""))
    if made.parent.name.startswith("chatlearn-token-"):
        shutil.rmtree(made.parent)


@pytest.mark.parametrize("given", [{}, {"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_TOKEN": " "}])
def test_a_token_is_made_for_the_run_and_only_its_owner_reads_it(environment, given):
    environment.update(given)
    prepare_token()
    path = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert environment["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert len(bytes.fromhex(path.read_text())) == 32
    prepare_token()
    assert environment["RAY_AUTH_TOKEN_PATH"] == str(path)


def test_a_users_token_is_taken(environment, tmp_path):
    environment["RAY_AUTH_TOKEN"] = "a token"
    prepare_token()
    assert "RAY_AUTH_TOKEN_PATH" not in environment
    assert agree_on_token(is_driver=True, is_alone=False, timeout_s=1) == b"a token"


def test_the_driver_of_several_nodes_makes_the_file_that_they_share(environment, tmp_path):
    token = agree_on_token(is_driver=True, is_alone=False, timeout_s=1)
    path = tmp_path / ".ray" / "auth_token"
    assert path.read_bytes() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert agree_on_token(is_driver=False, is_alone=False, timeout_s=1) == token


@pytest.mark.parametrize("start", [prepare_token, agree_on_token])
def test_a_cluster_without_a_token_is_not_started(environment, start):
    environment["RAY_AUTH_MODE"] = "disabled"
    options = {} if start is prepare_token else {"is_driver": True, "is_alone": True}
    options |= {} if start is prepare_token else {"timeout_s": 1}
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=disabled: .* unset RAY_AUTH_MODE"):
        start(**options)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("\n", "is empty")])
def test_a_users_file_without_a_token_is_refused(environment, tmp_path, content, message):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    environment["RAY_AUTH_TOKEN_PATH"] = str(path)
    with pytest.raises(ConfigError, match=message):
        prepare_token()
