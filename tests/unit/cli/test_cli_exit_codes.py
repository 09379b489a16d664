"""Exit codes of the command line."""

import sys
from pathlib import Path

import pytest
import yaml

from chatlearn import __version__
from chatlearn.cli.main import main

BUILDERS = """
from chatlearn import BaseModule, Engine, Environment, Evaluator
from chatlearn.engine.run import Terminated
from chatlearn.errors import DataError

class Echo(BaseModule):
    def forward_step(self, data):
        return {"y": data["x"]}

    def eval_step(self, data):
        raise ValueError("no good")

def rollout(config):
    model = Echo("echo")
    return Engine(Environment(lambda batch: model.forward_step(batch))).set_dataset([{"x": 1}])

def failing(config):
    model = Echo("echo")
    flow = Evaluator(lambda batch: model.eval_step(batch)).set_dataset([{"x": 1}])
    return Engine(evaluator=flow)

def interrupted(config):
    raise KeyboardInterrupt

def terminated(config):
    raise Terminated("SIGTERM: checkpoint saved")

def no_engine(config):
    return 3

def no_model(config):
    return Engine(Environment(lambda batch: None))
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command on a config with one of the builders; gives exit code, output and errors."""
    (tmp_path / "builders_of_exit.py").write_text(BUILDERS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run_command(command, builder, *arguments):
        text = f"runtime: {{engine: 'builders_of_exit:{builder}', backend: local}}\n"
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        code = main([command, "run.yaml", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run_command
    sys.modules.pop("builders_of_exit", None)


def test_the_version_is_printed_with_exit_code_0(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"chatlearn {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["check"], ["check", "run.yaml", "--fast"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: chatlearn" in capsys.readouterr().err


def test_a_good_config_passes_the_check(run):
    code, out, err = run("check", "rollout")
    assert (code, err) == (0, "")
    assert out.endswith("ok: nothing was started\n")


def test_a_run_that_ends_well_exits_with_0_and_names_its_folder(run):
    code, out, _ = run("train", "rollout")
    assert code == 0
    folder = out.removeprefix("run folder: ").rstrip()
    assert (Path(folder) / "config.yaml").is_file()


def test_a_failed_run_exits_with_1(run):
    code, _, err = run("eval", "failing")
    assert code == 1
    assert "ValueError: no good" in err


@pytest.mark.parametrize(
    ("builder", "arguments", "message"),
    [
        ("rollout", ["runtime.num_episodes=2"], "did you mean 'num_episode'?"),
        ("rollout", ["runtime.seed"], "expected key.path=value"),
        ("rollout", ["models.ecko.num_gpu=1"], "models.ecko: no flow calls a model of that name"),
        (
            "rollout",
            ["models.echo.num_gpu=4", "runtime.backend=ray", "--assume-devices", "2"],
            "there are 2 (1 nodes x 2)",
        ),
        ("rollout", ["--assume-devices", "0"], "expected at least 1 assumed device, got 0"),
        ("rollout", ["runtime.engine=nowhere:build"], "module 'nowhere' cannot be imported"),
        ("rollout", ["runtime.engine=rlhf"], "rlhf needs the models policy, reference, reward"),
        ("rollout", ["runtime.engine=null"], "runtime.engine is missing"),
        ("absent", [], "module 'builders_of_exit' has no 'absent'"),
        ("no_engine", [], "gave int; expected a chatlearn.Engine"),
        ("no_model", [], "calls no model"),
    ],
)
def test_a_bad_config_or_flow_exits_with_2(run, builder, arguments, message):
    code, out, err = run("check", builder, *arguments)
    assert (code, out) == (2, "")
    assert message in err


TINY = {"num_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
TINY |= {"max_sequence_length": 8, "module": "megatron_adapters:PolicyTrainer"}
INFERENCE = {**TINY, "module": "megatron_adapters:PolicyReference"}
PP2 = {"pipeline_model_parallel_size": 2}
DPO = {"reference": INFERENCE, "policy_trainer": TINY}


def check_models(tmp_path, monkeypatch, capsys, engine, models, command="check", **runtime):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    content = {"models": models, "runtime": {"engine": engine, **runtime}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    code = main([command, "run.yaml"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "policy_trainer",
            {"num_moe_experts": 8, "expert_model_parallel_size": 4, "num_gpu": 2},
            "4 x 1 = 4 does not divide",
        ),
        (
            "reference",
            {"num_moe_experts": 8, "expert_model_parallel_size": 2},
            "does not divide the 1 ranks",
        ),
        (
            "policy_trainer",
            {"num_moe_experts": 4, "tensor_model_parallel_size": 2},
            "needs sequence_parallel",
        ),
        (
            "policy_trainer",
            {**PP2, "num_layers_in_first_pipeline_stage": 5},
            "would have [5, -1] layers",
        ),
        ("policy_trainer", {**PP2, "pipeline_model_parallel_layout": "Et|tL"}, "2 in all"),
        ("policy_trainer", {"recompute_granularity": "full"}, "needs recompute_method"),
        ("policy_trainer", {"window_size": [4, 1]}, "window_size is [tokens back, 0]"),
    ],
)
def test_a_model_that_cannot_be_built_exits_with_2(
    tmp_path, monkeypatch, capsys, name, fields, message
):
    models = {**DPO, name: {**DPO[name], **fields}}
    code, out, err = check_models(tmp_path, monkeypatch, capsys, "dpo", models)
    assert (code, out) == (2, "")
    assert message in err
    assert f"models.{name}" in err


def test_a_policy_that_generates_with_virtual_stages_exits_with_2(tmp_path, monkeypatch, capsys):
    policy = {**TINY, **PP2, "module": "megatron_adapters:PolicyInference"}
    policy["virtual_pipeline_model_parallel_size"] = 2
    code, _, err = check_models(tmp_path, monkeypatch, capsys, "eval", {"policy": policy})
    assert code == 2
    assert "models.policy: a model that generates has no virtual stages" in err


MISSING = {"data_path": "absent.jsonl", "tokenizer": "absent.model"}


def test_the_check_reports_files_that_are_not_there(tmp_path, monkeypatch, capsys):
    models = {**DPO, "reference": {**INFERENCE, "load": "absent_folder"}}
    code, out, err = check_models(tmp_path, monkeypatch, capsys, "dpo", models, **MISSING)
    assert (code, err) == (0, "")
    assert "runtime.data_path: absent.jsonl is not there" in out
    assert "runtime.tokenizer: absent.model is not there" in out
    assert "models.reference.load: absent_folder is not there" in out
    assert out.endswith("ok: nothing was started; 3 files are missing\n")


def test_a_run_whose_files_are_not_there_exits_with_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "there.jsonl").write_text('{"prompt_token_ids": [3]}\n')
    for missing, message in (
        (MISSING, "runtime.data_path: absent.jsonl is not there"),
        ({**MISSING, "data_path": "there.jsonl"}, "runtime.tokenizer: absent.model is not there"),
    ):
        code, _, err = check_models(
            tmp_path, monkeypatch, capsys, "dpo", DPO, command="train", **missing
        )
        assert code == 2
        assert message in err
    assert not (tmp_path / "runs").exists()


def test_a_config_file_that_is_not_there_exits_with_2(capsys):
    assert main(["check", "nowhere.yaml"]) == 2
    assert "config file nowhere.yaml cannot be read" in capsys.readouterr().err


def test_an_evaluation_without_evaluator_exits_with_2(run):
    code, _, err = run("eval", "rollout")
    assert code == 2
    assert "has no evaluator: nothing to evaluate" in err


def test_ctrl_c_exits_with_130_and_sigterm_with_143(run):
    assert run("train", "interrupted")[::2] == (130, "interrupted\n")
    assert run("train", "terminated")[::2] == (143, "SIGTERM: checkpoint saved\n")


def test_overrides_may_stand_on_either_side_of_an_option(run):
    first = run("check", "rollout", "runtime.backend=ray", "--assume-devices", "4")
    last = run("check", "rollout", "--assume-devices", "4", "runtime.backend=ray")
    assert first[0] == 0
    assert last == first
