"""Engines that fail, or wait to be ended; the tests run them from the command line."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from toy_modules import Sampler, Trainer

from chatlearn import Engine, Environment
from chatlearn import Trainer as TrainerFlow


def note(text):
    """Tell the test that the moment has come."""
    folder = Path(os.environ["CHATLEARN_TEST_FOLDER"])
    draft = folder / f"draft.{os.getpid()}"
    draft.write_text(f"{text} {os.getpid()} {time.time()}")
    os.replace(draft, folder / "moment")


class RaisingTrainer(Trainer):
    def train_step(self, data, iteration):
        if self.rank == 1 and iteration == 1:
            note("raised")
            raise ValueError("the second batch is bad")
        return super().train_step(data, iteration)


class DyingTrainer(Trainer):
    def train_step(self, data, iteration):
        if self.rank == 1 and iteration == 1:
            note("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step(data, iteration)


class IdleTrainer(Trainer):
    def train_step(self, data, iteration):
        note("idle")
        time.sleep(300)


class BusyTrainer(Trainer):
    def train_step(self, data, iteration):
        time.sleep(0.05)
        metrics = super().train_step(data, iteration)
        note("busy")
        return metrics


class SlowStarter(Trainer):
    def setup(self):
        note("setup")
        time.sleep(300)


def _engine(trainer):
    sampler = Sampler("sampler")

    def env_flow(batch):
        return sampler.forward_step(batch)

    def trainer_flow(batch):
        trainer.train_step(batch)

    engine = Engine(Environment(env_flow), TrainerFlow(trainer_flow))
    return engine.set_dataset(list(range(8)))


def build_raising(_config):
    return _engine(RaisingTrainer("trainer"))


def build_dying(_config):
    return _engine(DyingTrainer("trainer"))


def build_idle(_config):
    return _engine(IdleTrainer("trainer"))


def build_busy(_config):
    return _engine(BusyTrainer("trainer"))


def build_slow_starter(_config):
    return _engine(SlowStarter("trainer"))
