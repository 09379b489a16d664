"""Files, includes, variables, overrides and model files."""

from typing import Any

import pytest

from chatlearn.config import load_config
from chatlearn.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    """Writes a file of the test's folder, and gives its path."""

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def test_what_is_neither_file_nor_mapping_is_refused():
    wrong: Any = [1]
    with pytest.raises(ConfigError, match="the config is a list; expected the path of a YAML file"):
        load_config(wrong)


def test_a_file_wins_over_what_it_includes_key_by_key(write):
    write("base/one.yaml", "runtime: {num_episode: 1, seed: 1, exp_name: one}\n")
    write("base/two.yaml", "includes: [one.yaml]\nruntime: {num_episode: 2, seed: 2}\n")
    path = write("run.yaml", "includes: [base/two.yaml]\nruntime: {num_episode: 3}\n")
    runtime = load_config(path).runtime
    assert (runtime.num_episode, runtime.seed, runtime.exp_name) == (3, 2, "one")


def test_a_later_include_wins_over_an_earlier_one(write):
    write("one.yaml", "runtime: {seed: 1}\n")
    write("two.yaml", "runtime: {seed: 2}\n")
    assert load_config(write("run.yaml", "includes: [one.yaml, two.yaml]\n")).runtime.seed == 2


def test_includes_that_close_a_cycle_are_refused(write):
    write("one.yaml", "includes: [two.yaml]\n")
    with pytest.raises(ConfigError, match=r"includes close a cycle: .*one.yaml -> .*two.yaml"):
        load_config(write("two.yaml", "includes: [one.yaml]\n"))


def test_includes_must_be_a_list(write):
    with pytest.raises(ConfigError, match="includes: expected a list of files"):
        load_config(write("run.yaml", "includes: base.yaml\n"))


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [\n", r"run.yaml:2: not valid YAML"),
        ("- 1\n", r"expected a mapping of sections, got list"),
        ("runtime: {seed: 1}\nruntime: {seed: 2}\n", r"run.yaml:2: the key 'runtime' occurs twice"),
        ("runtime:\n  seed: 1\n  seed: 1\n", r"run.yaml:3: the key 'seed' occurs twice"),
        ("models:\n  ? [a]\n  : {}\n", r"run.yaml:2: the key \['a'\] is no plain value"),
        ("runtime: !!python/name:os.system\n", "could not determine a constructor"),
        ("runtime: !!python/object/apply:os.mkdir [owned]\n", "could not determine a constructor"),
        ("runtime: !!python/object/new:os.mkdir [owned]\n", "could not determine a constructor"),
        ("runtime: !!binary eA==\n", "could not determine a constructor"),
        ("runtime: {seed: 1}\0\n", "not valid YAML: unacceptable character"),
        (f"runtime: {'[' * 500}\n", "nested too deeply"),
        (f"runtime: {{seed: {'9' * 5000}}}\n", "a number cannot be read"),
        ("models: &all {policy: *all}\n", "run.yaml:1: an alias stands within what it names"),
        (BOMB, "more than 100000 entries, aliases written out"),
        ('includes: ["a\\0b"]\n', "embedded null byte"),
        ("includes: [/dev/zero]\n", "is longer than|not valid YAML"),
    ],
)
def test_a_file_that_is_no_plain_mapping_is_refused(write, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_config(write("run.yaml", text))
    assert not (tmp_path / "owned").exists()


def test_a_date_is_a_text(write):
    path = write("run.yaml", "runtime: {exp_name: 2026-02-30}\n")
    assert load_config(path).runtime.exp_name == "2026-02-30"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere.yaml cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_an_empty_file_gives_the_defaults(write):
    assert load_config(write("run.yaml", "")) == load_config({})


def test_a_key_may_override_one_that_a_merge_key_brings(write):
    text = (
        "models:\n  policy: &policy {num_gpu: 1, hidden_size: 8}\n"
        "  twin:\n    <<: *policy\n    num_gpu: 2\n"
    )
    twin = load_config(write("run.yaml", text)).models["twin"]
    assert (twin.num_gpu, twin.megatron) == (2, {"hidden_size": 8})


def test_exponents_without_a_point_are_numbers(write):
    config = load_config(write("run.yaml", "models: {policy: {lr: 1e-5}}\n"))
    assert config.models["policy"].megatron == {"lr": 1e-5}


def test_a_variable_comes_from_the_environment_else_from_its_default(monkeypatch):
    monkeypatch.setenv("SET_HERE", "7")
    monkeypatch.delenv("NOT_SET", raising=False)
    content = {
        "runtime": {
            "seed": "${SET_HERE:1}",
            "num_episode": "${NOT_SET:5}",
            "exp_name": "run-${SET_HERE}-${NOT_SET:x}",
            "tokenizer": "${NOT_SET:}",
        }
    }
    runtime = load_config(content).runtime
    assert (runtime.seed, runtime.num_episode) == (7, 5)
    assert (runtime.exp_name, runtime.tokenizer) == ("run-7-x", None)


def test_an_unset_variable_without_default_is_refused_with_its_key(monkeypatch):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=r"runtime.seed: the environment variable NOT_SET is not"):
        load_config({"runtime": {"seed": "${NOT_SET}"}})


def test_overrides_win_and_are_read_as_yaml(write):
    path = write("run.yaml", "runtime: {seed: 1, num_episode: 2}\n")
    config = load_config(
        path,
        ["runtime.seed=9", "runtime.colocation=[[a, b]]", "models.a.lr=2e-6", "models.b.num_gpu=2"],
    )
    assert (config.runtime.seed, config.runtime.num_episode) == (9, 2)
    assert config.runtime.colocation_groups == (("a", "b"),)
    assert config.models["a"].megatron == {"lr": 2e-6}


@pytest.mark.parametrize("entry", ["runtime.seed", "=3", "runtime..seed=3", ".seed=1"])
def test_an_override_without_a_path_or_a_value_is_refused(entry):
    with pytest.raises(ConfigError, match=r"expected key.path=value"):
        load_config({}, [entry])


def test_a_model_file_lies_beneath_the_models_own_keys(write):
    write("shapes/small.yaml", "hidden_size: 8\nnum_layers: 2\nnum_gpu: 4\n")
    text = "models: {policy: {model_config_file: ../shapes/small.yaml, num_layers: 6}}\n"
    base = write("base/models.yaml", text)
    run = write("run.yaml", "includes: [base/models.yaml]\nmodels: {policy: {num_gpu: 1}}\n")
    assert load_config(base).models["policy"].num_gpu == 4
    policy = load_config(run, ["models.policy.hidden_size=16"]).models["policy"]
    assert policy.megatron == {"hidden_size": 16, "num_layers": 6}
    assert policy.num_gpu == 1


def test_mappings_and_overrides_may_name_a_model_file(write):
    path = write("small.yaml", "hidden_size: 8\n")
    named = {"models": {"policy": {"model_config_file": str(path)}}}
    assert load_config(named).models["policy"].megatron == {"hidden_size": 8}
    config = load_config({}, [f"models.policy.model_config_file={path}"])
    assert config.models["policy"].megatron == {"hidden_size": 8}


def test_a_model_file_that_names_another_is_refused(write):
    path = write("a.yaml", "model_config_file: b.yaml\n")
    with pytest.raises(ConfigError, match="model_config_file within a model file: use includes"):
        load_config({"models": {"policy": {"model_config_file": str(path)}}})


def test_the_environment_may_name_the_config(write, monkeypatch):
    monkeypatch.setenv("CHATLEARN_CONFIG", str(write("run.yaml", "runtime: {seed: 5}\n")))
    assert load_config().runtime.seed == 5
