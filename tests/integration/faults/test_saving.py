"""Workers die while a checkpoint or a dump is written, or before there is any."""

from __future__ import annotations

import os
import signal
import time

import fault_modules as faults
import pytest
import torch
from test_recovery import account, recoveries

from chatlearn import BaseModule, Engine, Environment
from chatlearn import Trainer as TrainerFlow
from chatlearn.checkpoint.folders import find_checkpoints, find_damage
from chatlearn.data.relay import RelaySampleManager
from chatlearn.errors import WorkerError
from chatlearn.models.faults import NumericFault

pytestmark = pytest.mark.alone


class SlowWriter(BaseModule):
    """Takes its time over its file of a checkpoint, and dies over the first one it writes."""

    def setup(self):
        self.folder = self.args["folder"]

    def forward_step(self, data):
        return {**data, "rewards": [1.0 for _ in data["prompt"]]}

    def save_checkpoint(self, iteration):
        path = self.checkpoint_dir / "own"

        def write():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("begun")
            if os.path.exists(f"{self.folder}/die"):
                os.unlink(f"{self.folder}/die")
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)
            return [path]

        self.write_files(write)


class Learning(SlowWriter):
    def train_step(self, data):
        return {"loss": 1.0}


def test_a_trainer_that_dies_over_its_file_takes_the_run_back(learn, tmp_path):
    arguments = {"folder": str(tmp_path)}
    reward, trainer = SlowWriter("reward", arguments), Learning("trainer", arguments)
    (tmp_path / "die").touch()
    engine = Engine(
        Environment(lambda b: reward.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    ).set_dataset([1, 2, 3])
    start_s = time.monotonic()
    settings = {"num_episode": 2, "save_episode_interval": 1, "max_restarts": 1}
    result = learn(engine, **settings)
    assert time.monotonic() - start_s < 50
    assert [entry["step"] for entry in result.metrics] == [1, 2]
    (recovery,) = recoveries(result)
    assert recovery["kind"] == "roll_back"
    saved = find_checkpoints(result.run_dir / "checkpoints")
    assert len(saved) == 2
    assert [find_damage(path) for path in saved] == [None, None]


class HeldWriter(BaseModule):
    """A stale model, which is saved, too; its replica is gone before its file is there."""

    def setup(self):
        self.model = torch.nn.Linear(1, 1)

    def forward_step(self, data):
        return {**data, "rewards": [1.0 for _ in data["prompt"]]}

    def save_checkpoint(self, iteration):
        folder = self.args["folder"]

        def write():
            if os.path.exists(f"{folder}/die"):
                os.unlink(f"{folder}/die")
                time.sleep(0.5)
                os.kill(os.getpid(), signal.SIGKILL)

        self.write_files(write)


class StaleTrainer(BaseModule):
    def setup(self):
        self.model = torch.nn.Linear(1, 1)

    def train_step(self, data):
        return {"loss": 1.0}


def test_a_replica_that_dies_over_its_file_is_replaced_and_the_checkpoint_made_again(
    learn, tmp_path
):
    held, trainer = HeldWriter("held", {"folder": str(tmp_path)}), StaleTrainer("trainer")
    (tmp_path / "die").touch()
    engine = Engine(
        Environment(lambda b: held.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    ).set_dataset([1, 2, 3])
    engine.set_parameter_sync(trainer, held)
    settings = {"num_episode": 1, "save_episode_interval": 1, "max_restarts": 1}
    models = {"held": {"sync_frequency": 2, "num_gpu": 2}}
    result = learn(engine, models, **settings)
    (recovery,) = recoveries(result)
    assert recovery["kind"] == "in_place"
    (saved,) = find_checkpoints(result.run_dir / "checkpoints")
    assert find_damage(saved) is None


class Counting(RelaySampleManager):
    def __init__(self):
        super().__init__()
        self.turn = 0

    def __call__(self, episodes):
        self.turn += 1
        self.log_metrics({"turn": self.turn})
        return episodes[-1].buffer

    def state(self):
        return {"turn": self.turn}

    def restore(self, state):
        self.turn = state["turn"]


def test_a_run_that_begins_again_lets_its_sample_manager_begin_again(learn, tmp_path):
    faults.plan_fault(tmp_path, "trainer.train2", "kill")
    engine = faults.build(tmp_path).set_relay_sample_manager(Counting())
    settings = {**faults.SETTINGS, "save_episode_interval": None, "num_episode": 2}
    result = learn(engine, **settings)
    assert [entry["relay/turn"] for entry in result.metrics] == [1.0, 2.0]
    assert [entry["kind"] for entry in recoveries(result)] == ["roll_back"]
    assert account(result)["rows"].keys() == {0, 1, 2, 3}


def test_what_a_replacement_raises_ends_the_run(learn, tmp_path):
    faults.plan_fault(tmp_path, "policy.forward", "kill and policy.setup raise")
    with pytest.raises(WorkerError, match="told to raise"):
        learn(faults.build(tmp_path), {"policy": {"num_gpu": 2}}, **faults.SETTINGS)


class Reporting(BaseModule):
    """Two ranks see a fault; one of them cannot dump its rows."""

    def setup(self):
        self.model = torch.nn.Linear(1, 1)

    def step_state(self, micro_batches):
        if self.rank == 1:
            raise OSError("no space left")
        return {}

    def train_step(self, data):
        self.report_fault(NumericFault("loss", 1.0, "warn", "the loss is odd"))
        return {"loss": 1.0}


def test_a_dump_that_fails_on_one_rank_is_given_up_on_all(learn):
    trainer = Reporting("trainer")
    engine = Engine(None, TrainerFlow(lambda b: trainer.train_step(b))).set_dataset([1, 2, 3])
    result = learn(engine, {"trainer": {"num_gpu": 2}}, num_episode=2, sync_timeout_s=20)
    assert len(result.metrics) == 2
    assert [path.name for path in result.run_dir.glob("dumps/*")] == []
