"""Mistakes of a user's module, data or config: each a message that says what to change."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_modules import Sampler, Scorer, Trainer

import chatlearn
from chatlearn import BaseModule, Engine, Environment
from chatlearn import Trainer as TrainerFlow
from chatlearn.errors import ConfigError, PlacementError, WaitTimeoutError, WorkerError

pytestmark = pytest.mark.alone

HERE = Path(__file__).parent


class Returning(BaseModule):
    def __init__(self, name, result):
        super().__init__(name)
        self.result = result

    def forward_step(self, data):
        return self.result


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "NoneType"),
        ([1, 2, 3], "list"),
        ({"answer": [1, 2]}, "has 2 entries; expected 3"),
        ({"answer": torch.zeros(4, 2)}, "shape (4, 2); expected a first axis of 3"),
        ({"answer": 5}, "answer"),
    ],
)
def test_an_output_that_is_not_as_many_rows_is_refused(learn_locally, result, message):
    model = Returning("model", result)
    engine = Engine(Environment(lambda b: model.forward_step(b))).set_dataset([1, 2, 3])
    with pytest.raises(WorkerError) as caught:
        learn_locally(engine)
    text = str(caught.value)
    assert "model.forward_step" in text
    assert message in text
    assert "test_bad_input.py" in caught.value.flow_line


def test_a_missing_key_names_the_call(learn_locally):
    scorer = Scorer("scorer")
    engine = Engine(Environment(lambda b: scorer.forward_step(b))).set_dataset([1])
    with pytest.raises(WorkerError, match="KeyError: 'answer'") as caught:
        learn_locally(engine)
    assert "scorer.forward_step(b)" in caught.value.flow_line
    assert 'data["answer"]' in caught.value.worker_traceback


def test_a_key_with_two_contents_names_both_producers(learn_locally):
    left = Returning("left", {"answer": [1, 1]})
    right = Returning("right", {"answer": [1, 2]})
    scorer = Scorer("scorer")

    def env_flow(batch):
        return scorer.forward_step(left.forward_step(batch), right.forward_step(batch))

    with pytest.raises(WorkerError, match="answer") as caught:
        learn_locally(Engine(Environment(env_flow)).set_dataset([1, 2]))
    assert "left.forward_step" in str(caught.value)
    assert "right.forward_step" in str(caught.value)


@pytest.mark.parametrize(("result", "message"), [(3, "int"), ({"loss": "high"}, "numbers")])
def test_train_step_gives_metrics_or_nothing(learn_locally, result, message):
    class Wrong(Trainer):
        def train_step(self, data):
            return result

    trainer = Wrong("trainer")
    engine = Engine(None, TrainerFlow(lambda b: trainer.train_step(b))).set_dataset([1])
    with pytest.raises(WorkerError, match=message):
        learn_locally(engine)


@pytest.mark.parametrize("built", [[], 5, [1, 2]])
def test_build_dataset_gives_rows(learn_locally, built):
    class Wrong(Sampler):
        def build_dataset(self, prompts, is_eval=False):
            return built

    sampler = Wrong("sampler")
    with pytest.raises(WorkerError, match="build_dataset"):
        learn_locally(Engine(Environment(lambda b: sampler.forward_step(b))).set_dataset([1]))


def test_a_misspelt_key_names_the_nearest():
    with pytest.raises(ConfigError, match="generation_batch_size"):
        chatlearn.init({"runtime": {"generation_batchsize": 4}})


def test_too_few_devices_are_told_before_anything_starts(tmp_path):
    sampler = Sampler("sampler")
    engine = Engine(Environment(lambda b: sampler.forward_step(b))).set_dataset([1])
    chatlearn.init(
        {
            "models": {"sampler": {"num_gpu": 4}},
            "runtime": {"devices_per_node": 3, "output_dir": str(tmp_path)},
        }
    )
    with pytest.raises(PlacementError) as caught:
        engine.learn()
    assert "the models ask for 4 logical devices; there are 3" in str(caught.value)
    assert "sampler" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class Sleeping(Sampler):
    def forward_step(self, data):
        time.sleep(60)


def test_a_stage_that_does_not_end_runs_into_its_limit(learn):
    sampler = Sleeping("sampler")
    engine = Engine(Environment(lambda b: sampler.forward_step(b))).set_dataset([1])
    with pytest.raises(WaitTimeoutError, match=r"sampler.forward_step on sampler.r0.0") as caught:
        learn(engine, stage_timeout_s=2)
    assert "runtime.stage_timeout_s=2" in str(caught.value)


SMALL_SHM = """
import shutil, sys
from collections import namedtuple
import torch
import chatlearn
from chatlearn import Engine, Environment
from toy_modules import BaseModule

class Big(BaseModule):
    def forward_step(self, data):
        return {"prompt": data["prompt"], "block": [torch.ones(5_000_000)] * len(data["prompt"])}

class Sum(BaseModule):
    def forward_step(self, data):
        return {"total": [float(block.sum()) for block in data["block"]]}

if __name__ == "__main__":
    real = shutil.disk_usage
    usage = namedtuple("usage", "total used free")
    def disk_usage(path):
        return usage(64 << 20, 0, 64 << 20) if str(path) == "/dev/shm" else real(path)
    shutil.disk_usage = disk_usage
    big, total = Big("big"), Sum("total")
    engine = Engine(Environment(lambda b: total.forward_step(big.forward_step(b))))
    chatlearn.init({"runtime": {"output_dir": sys.argv[1], "generation_batch_size": 1}})
    rows = engine.set_dataset(list(range(6))).learn().rollouts
    print("totals", [row["total"] for row in rows])
"""


def test_a_small_shared_memory_is_noticed_and_worked_around(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SMALL_SHM)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env={**environment, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"totals {[5_000_000.0] * 6}" in done.stdout
    assert "/dev/shm has only 64 MB free" in done.stderr
