"""Numbers that go wrong are caught before the update, dumped, and run again alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import megatron_runs as runs
import pytest
import torch

import chatlearn
from chatlearn.cli.main import main
from chatlearn.engine.from_config import build_engine, build_module
from chatlearn.errors import NumericsError, WorkerError

ROWS = [{"prompt_token_ids": [3 + i, 4], "response_token_ids": [5, 6, 2 + i % 3]} for i in range(6)]
SETTINGS = {
    "algorithm": {"loss": "sft"},
    "train_global_batch_size": 3,
    "train_micro_batch_size": 3,
    "num_episode": 2,
    "save_episode_interval": 1,
    "deterministic": True,
    "data_shuffle": False,
    "enable_tensorboard": False,
}


def spoil(kind):
    """A policy trainer whose second update has a loss or gradient that is not finite."""
    from megatron_adapters import PolicyTrainer

    class SpoiledTrainer(PolicyTrainer):
        def train_step(self, data, iteration):
            self.spoils = iteration == 1
            return super().train_step(data)

        def update(self, batches, loss):
            if not self.spoils:
                return super().update(batches, loss)
            inner = loss.function

            def function(scores, batch):
                result = inner(scores, batch)
                if kind == "loss":
                    return type(result)(result.loss * float("nan"), result.kept * float("nan"))
                spoiled = result.loss * 1.0
                spoiled.register_hook(lambda gradient: gradient * float("inf"))
                return type(result)(spoiled, result.kept)

            return super().update(batches, type(loss)(loss.names, function))

    SpoiledTrainer.__qualname__ = f"SPOILED_{kind.upper()}"
    SpoiledTrainer.__module__ = "test_guards"
    return SpoiledTrainer


SPOILED_LOSS = spoil("loss")
SPOILED_GRADIENT = spoil("gradient")


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))

    def run(kind, backend="local", layout=None, rows=ROWS, **runtime):
        section = {**runs.SHAPE, "module": f"test_guards:SPOILED_{kind.upper()}", **(layout or {})}
        content = {
            "models": {"policy_trainer": section},
            "runtime": {
                **SETTINGS,
                "backend": backend,
                "engine": "test_guards:build",
                "output_dir": str(tmp_path),
                **runtime,
            },
        }
        return build_engine(chatlearn.init(content)).set_dataset(rows).learn()

    return run


def build(config):
    trainer = build_module(config, "policy_trainer")
    return chatlearn.Engine(None, chatlearn.Trainer(lambda b: trainer.train_step(b)))


def the_dump(tmp_path):
    (dump,) = tmp_path.glob("chatlearn/*/dumps/*")
    return dump


def replay(dump, capsys, *overrides):
    capsys.readouterr()
    code = main(["replay", str(dump), *overrides])
    return code, capsys.readouterr()


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_stop_ends_the_run_and_the_step_can_be_run_again(start, tmp_path, capsys, kind):
    name = {"loss": "loss is nan", "gradient": "gradient norm is (inf|nan)"}[kind]
    with pytest.raises(WorkerError, match=f"NumericsError: .*{name}.*chatlearn replay"):
        start(kind)
    dump = the_dump(tmp_path)
    record = json.loads((dump / "step.json").read_text())
    assert (record["model"], record["iteration"]) == ("policy_trainer", 1)
    code, said = replay(dump, capsys)
    assert code == 0, said.err
    assert "then: model 'policy_trainer': the " in said.out
    assert "the fault has come again" in said.out


@pytest.mark.alone
def test_a_step_of_several_ranks_is_run_again_on_one(start, ray_cluster, tmp_path, capsys):
    layout = {"num_gpu": 4, "tensor_model_parallel_size": 2, "use_distributed_optimizer": True}
    with pytest.raises(WorkerError, match="the loss is nan"):
        start("loss", "ray", layout)
    dump = the_dump(tmp_path)
    assert len(list(dump.glob("rows.*.pt"))) == 2
    code, said = replay(dump, capsys)
    assert code == 0, said.err
    assert "the fault has come again" in said.out


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_skip_is_as_if_the_batch_had_not_been_there(start, tmp_path, kind):
    result = start(kind, guards={"not_finite": "skip"}, num_episode=1)
    assert result.metrics[0]["train/policy_trainer/skipped_step"] == 0.5
    assert (the_dump(tmp_path) / "rows.0.pt").is_file()
    short = start(kind, rows=ROWS[:3], num_episode=1)
    found, expected = (
        runs.saved_tensors(run.run_dir, 1, ["policy_trainer"]) for run in (result, short)
    )
    assert len(expected) > 20
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_load_balancing_type": "none",
}


def test_a_skipped_step_leaves_the_routers_selection_biases(start):
    result = start("loss", layout=MOE, guards={"not_finite": "skip"}, num_episode=1)
    short = start("none", layout=MOE, rows=ROWS[:3], num_episode=1)
    found, expected = (
        runs.saved_tensors(run.run_dir, 1, ["policy_trainer"]) for run in (result, short)
    )
    biases = [name for name in expected if "expert_bias" in name]
    assert biases
    assert all(expected[name].abs().max() > 0 for name in biases)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_warn_goes_on_and_says_so(start, tmp_path, caplog):
    result = start("loss", guards={"not_finite": "warn", "max_dumps": 0}, num_episode=1)
    assert result.metrics[0]["step"] == 1
    assert "the loss is nan" in caplog.text
    assert list(tmp_path.glob("chatlearn/*/dumps/*")) == []


def test_limits_of_other_numbers_act_and_dumps_are_bounded(start, tmp_path):
    guards = {"grad_norm_limit": 1e-6, "grad_norm_action": "skip", "max_dumps": 2}
    result = start("none", guards=guards)
    assert [m["train/policy_trainer/skipped_step"] for m in result.metrics] == [1.0, 1.0]
    assert len(list(tmp_path.glob("chatlearn/*/dumps/*"))) == 2


SPOILED_NONE = type("SPOILED_NONE", (SPOILED_LOSS.__mro__[1],), {"__module__": "test_guards"})


@pytest.mark.parametrize("name", ["rows.0.pt", "step.json", "config.yaml", "model/metadata.json"])
def test_a_damaged_dump_is_refused_in_a_line(start, tmp_path, capsys, name):
    with pytest.raises(WorkerError):
        start("loss")
    dump = the_dump(tmp_path)
    (dump / name).write_bytes(b"\x80\x04}{")
    code, said = replay(dump, capsys)
    assert code in (1, 2)
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err.splitlines()[0]


class Collapsing(chatlearn.BaseModule):
    """A reward that falls from episode to episode."""

    def forward_step(self, data):
        first = int(data["number"][0])
        return {**data, "rewards": torch.full((len(data["number"]),), 1.0 - first)}


class Counting(chatlearn.BaseModule):
    def train_step(self, data):
        return {"loss": 1.0}


@pytest.mark.parametrize("action", ["stop", "skip", "warn"])
def test_a_reward_that_collapses_is_noticed_before_training(learn_locally, action):
    reward, trainer = Collapsing("reward"), Counting("trainer")
    engine = chatlearn.Engine(
        chatlearn.Environment(lambda b: reward.forward_step(b)),
        chatlearn.Trainer(lambda b: trainer.train_step(b)),
    ).set_dataset([{"number": i} for i in range(3)])
    guards = {"reward_drop_limit": 0.5, "reward_drop_action": action}
    settings = {"num_episode": 2, "sample_per_episode": 1, "data_shuffle": False, "guards": guards}
    if action == "stop":
        with pytest.raises(NumericsError, match="mean reward is 0, more than"):
            learn_locally(engine, **settings)
        return
    result = learn_locally(engine, **settings)
    assert ("train/trainer/loss" in result.metrics[1]) is (action == "warn")
    assert result.metrics[1].get("skipped_episode", 0.0) == float(action == "skip")


@pytest.mark.parametrize("action", ["stop", "warn"])
def test_the_samples_of_a_collapse_are_dumped_and_measured_again(
    learn_locally, tmp_path, caplog, capsys, action
):
    test_a_reward_that_collapses_is_noticed_before_training(learn_locally, action)
    dump = the_dump(tmp_path)
    assert "chatlearn replay` on it" in caplog.text or action == "stop"
    code, said = replay(dump, capsys)
    assert code == 0
    assert "then: episode 2: the mean reward is 0, more than" in said.out
    assert "the fault has come again" in said.out
    code, said = replay(dump, capsys, "runtime.guards.reward_drop_limit=2.0")
    assert (code, "not again" in said.out) == (0, True)


class Diverging(chatlearn.BaseModule):
    """Its weights, or its loss on the last rank, are no numbers after the second update."""

    def setup(self):
        self.model = torch.nn.Linear(1, 1)

    def train_step(self, data, iteration):
        if iteration == 1 and self.args["what"] == "weights":
            torch.nn.init.constant_(self.model.weight, float("inf"))
        is_bad = iteration == 1 and self.args["what"] == "loss" and self.rank == 1
        return {"loss": float("nan") if is_bad else 1.0}


def diverge(what, **arguments):
    trainer = Diverging("trainer", {"what": what, **arguments})
    engine = chatlearn.Engine(None, chatlearn.Trainer(lambda b: trainer.train_step(b)))
    return engine.set_dataset([{"number": i} for i in range(4)])


ONE_AT_A_TIME = {"num_episode": 1, "train_global_batch_size": 2}


def test_weights_of_a_plain_module_that_are_no_numbers_stop_the_run(
    learn_locally, tmp_path, capsys
):
    with pytest.raises(WorkerError, match="weight weight is not finite after the update"):
        learn_locally(diverge("weights"), **ONE_AT_A_TIME)
    code, said = replay(the_dump(tmp_path), capsys)
    assert code == 0, said.err
    assert "the fault has come again" in said.out


def test_a_fault_on_one_rank_of_a_plain_module_is_dumped_by_all(learn, tmp_path):
    with pytest.raises(WorkerError, match="the loss is nan.*chatlearn replay"):
        learn(diverge("loss"), {"trainer": {"num_gpu": 2}}, **ONE_AT_A_TIME)
    assert len(list(the_dump(tmp_path).glob("rows.*.pt"))) == 2


PROGRAM = """
import chatlearn


class Failing(chatlearn.BaseModule):
    def train_step(self, data):
        return {"loss": float(self.args["loss"])}


if __name__ == "__main__":
    trainer = Failing("trainer", {"loss": "inf"})
    chatlearn.init({"runtime": {"output_dir": "OUTPUT", "backend": "local", "num_episode": 1}})
    engine = chatlearn.Engine(None, chatlearn.Trainer(lambda b: trainer.train_step(b)))
    engine.set_dataset([{"number": 1}]).learn()
"""


def test_a_step_of_a_program_of_ones_own_is_run_again(tmp_path, capsys):
    program = tmp_path / "train.py"
    program.write_text(PROGRAM.replace("OUTPUT", str(tmp_path)))
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode != 0
    code, said = replay(the_dump(tmp_path), capsys)
    assert code == 0, said.err
    assert "the fault has come again" in said.out


def test_a_dump_holds_no_secret_and_is_written_whatever_the_arguments_are(
    learn_locally, tmp_path, capsys
):
    def fail(**arguments):
        engine = diverge("weights", **arguments)
        with pytest.raises(WorkerError, match="chatlearn replay"):
            learn_locally(engine, **ONE_AT_A_TIME)
        return max(tmp_path.glob("chatlearn/*/dumps/*"), key=lambda path: path.stat().st_mtime)

    dump = fail(api_token="sesame-open-now")
    text = (dump / "step.json").read_text()
    assert "API_TOKEN" in text
    assert "sesame" not in text
    code, said = replay(fail(thing=object()), capsys)
    assert code == 2
    assert "arguments that no file holds" in said.err
