"""Secrets of the environment and of a config stay out of everything that is written down."""

import pytest
import yaml

from chatlearn.cli.main import main
from chatlearn.config import dump_config, load_config
from chatlearn.config.secrets import find_secrets, hide_secrets, is_secret_variable
from chatlearn.errors import ConfigError

VALUE = "hf_NeverWriteThisDown"


@pytest.fixture(autouse=True)
def _token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", VALUE)


def with_variables(**variables):
    return {"runtime_env": {"env_vars": variables}}


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        ("HF_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("RAY_AUTH_TOKEN", True),
        ("AWS_SECRET_ACCESS_KEY", True),
        ("db_password", True),
        ("GH_PAT", True),
        ("DB_PASS", True),
        ("SERVICE_PWD", True),
        ("PWD", False),
        ("OLDPWD", False),
        ("PATH", False),
        ("LD_LIBRARY_PATH", False),
        ("NUM_PASSES", False),
        ("COMPASS_PATTERN", False),
        ("RAY_AUTH_TOKEN_PATH", False),
        ("RAY_AUTH_MODE", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("KEYBOARD", False),
        ("OMP_NUM_THREADS", False),
    ],
)
def test_a_variable_is_known_by_its_name(name, is_secret):
    assert is_secret_variable(name) == is_secret


@pytest.mark.parametrize(
    "content",
    [
        with_variables(HF_TOKEN="${HF_TOKEN}"),
        with_variables(HUB="${HF_TOKEN}", OTHER="1"),
        {"models": {"judge": {"num_cpu": 1, "args": {"url": "https://x:${HF_TOKEN}@host/"}}}},
        {"models": {"judge": {"num_cpu": 1, "args": {"keys": ["${HF_TOKEN}"]}}}},
    ],
)
def test_a_written_config_names_the_variable_and_reads_back(content, tmp_path):
    config = load_config(content)
    text = dump_config(config)
    assert VALUE not in text
    assert "${HF_TOKEN}" in text
    (tmp_path / "config.yaml").write_text(text)
    assert load_config(tmp_path / "config.yaml") == config


def test_what_an_override_or_a_file_says_of_a_secret_is_not_written_either():
    overrides = ["runtime_env.env_vars.WANDB_API_KEY=0123456789", "models.m.args.api_key=abc"]
    config = load_config({"models": {"m": {"num_cpu": 1}}}, overrides)
    written = yaml.safe_load(dump_config(config))
    assert written["runtime_env"]["env_vars"] == {"WANDB_API_KEY": "${WANDB_API_KEY}"}
    assert written["models"]["m"]["args"] == {"api_key": "${API_KEY}"}


def test_words_of_a_vocabulary_are_no_secrets():
    args = {"pad_token": "<pad>", "key": "prompt", "max_new_tokens": 5, "token_ids": [1]}
    config = load_config({"models": {"m": {"num_cpu": 1, "args": args}}})
    assert yaml.safe_load(dump_config(config))["models"]["m"]["args"] == args


@pytest.mark.parametrize("value", ["0123", "1e400", "null", "12345678901234567890", "[a"])
def test_a_variable_reaches_the_workers_as_it_is(monkeypatch, value):
    monkeypatch.setenv("WANDB_API_KEY", value)
    config = load_config(with_variables(WANDB_API_KEY="${WANDB_API_KEY}"))
    assert config.runtime_env.env_vars["WANDB_API_KEY"] == value


@pytest.mark.parametrize(
    ("content", "overrides"),
    [
        ({"runtime_env": {"env_vars": "${HF_TOKEN}"}}, []),
        ({"runtime_env": {"env_vars": {"HF_TOKEN": ["${HF_TOKEN}"]}}}, []),
        ({"runtime": {"seed": "${HF_TOKEN}"}}, []),
        ({"runtime": {"sed": 1}, "${HF_TOKEN}": 2}, ["runtime.seed=" + VALUE]),
        ({}, [f"runtime_env.env_vars.X=[{VALUE}"]),
        ({}, [f"runtime_env.env_vars=!{VALUE} x"]),
        ({}, ["runtime_env.env_vars.DB_PASSWORD=" + VALUE[::-1], "runtime_env.env_vars.A=[1]"]),
    ],
)
def test_no_message_shows_a_secret(content, overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(content, overrides)
    shown = f"{caught.value} {caught.value.__cause__}"
    assert VALUE not in shown
    assert VALUE[::-1] not in shown


def test_what_the_command_line_says_shows_no_secret(tmp_path, capsys):
    path = tmp_path / f"{VALUE}.yaml"
    assert main(["check", str(path)]) == 2
    found = capsys.readouterr()
    assert VALUE not in found.out + found.err
    assert "${HF_TOKEN}.yaml cannot be read" in found.err


def test_short_values_and_longer_ones_within(monkeypatch):
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("LONGER_TOKEN", f"{VALUE}-and-more")
    assert hide_secrets(f"abc {VALUE}-and-more {VALUE}") == "abc ${LONGER_TOKEN} ${HF_TOKEN}"
    assert "abc" not in find_secrets()
