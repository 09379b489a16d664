"""SIGTERM at every moment of an episode: what is saved is gone on from, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal

import numpy as np
import pytest
import torch
from test_resume import MODELS, SETTINGS, Dicer, Keeper, Learner, lines, weights

from chatlearn import Engine, Environment, Evaluator
from chatlearn import Trainer as TrainerFlow
from chatlearn.checkpoint.run_state import read_run_state
from chatlearn.engine.sigterm import Terminated


class Clock:
    """Sends SIGTERM at the moment that it is set to, once."""

    def __init__(self):
        self.moment = None

    def pass_by(self, moment):
        if moment == self.moment:
            self.moment = None
            os.kill(os.getpid(), signal.SIGTERM)


CLOCK = Clock()


class SignalledDicer(Dicer):
    def forward_step(self, data):
        output = super().forward_step(data)
        CLOCK.pass_by(f"forward {self.calls}")
        return output

    def eval_step(self, data):
        CLOCK.pass_by("eval")
        return super().forward_step(data)


class SignalledLearner(Learner):
    def train_step(self, data, iteration):
        CLOCK.pass_by(f"train {iteration}")
        return super().train_step(data)

    def save_checkpoint(self, iteration):
        CLOCK.pass_by(f"save {iteration}")
        super().save_checkpoint(iteration)


@pytest.fixture
def run(learn_locally):
    def start(moment=None, **runtime):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        policy, old = SignalledDicer("policy"), SignalledDicer("old")
        trainer = SignalledLearner("trainer")

        def rollout(batch):
            out = policy.forward_step(batch)
            old.forward_step(batch)
            return out

        engine = Engine(
            Environment(rollout),
            TrainerFlow(lambda b: trainer.train_step(b)),
            Evaluator(lambda b: policy.eval_step(b)).set_dataset([1, 2]),
        )
        engine.set_dataset(list(range(10))).set_relay_sample_manager(Keeper())
        engine.set_parameter_sync(trainer, policy).set_parameter_sync(trainer, old)
        CLOCK.moment = moment
        return learn_locally(engine, MODELS, **{**SETTINGS, **runtime})

    return start


@pytest.fixture
def stop(run, tmp_path):
    def start(moment, **runtime):
        before = set(tmp_path.glob("chatlearn/*"))
        with pytest.raises(Terminated) as caught:
            run(moment, **runtime)
        (run_dir,) = set(tmp_path.glob("chatlearn/*")) - before
        saved = sorted(run_dir.glob("checkpoints/episode_*"))
        return str(caught.value), run_dir, saved

    return start


@pytest.mark.parametrize(
    ("moment", "interval"), [("forward 3", 1), ("forward 3", None), ("save 10", 1), ("eval", 1)]
)
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, stop, moment, interval):
    whole = run()
    said, _, saved = stop(moment, save_episode_interval=interval)
    assert str(saved[-1]) in said
    again = run(resume=str(saved[-1]))
    assert lines(again.run_dir) == lines(whole.run_dir)
    assert weights(again.run_dir) == weights(whole.run_dir)


def test_a_signal_while_an_episode_is_saved_keeps_its_line(stop):
    said, run_dir, saved = stop("save 10")
    assert [path.name for path in saved] == ["episode_000001", "episode_000002"]
    assert f"; saved {saved[-1]}" in said
    steps = [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").open()]
    assert steps == [1, 2]
    assert not read_run_state(saved[-1]).is_partial


def test_an_exact_checkpoint_counts_also_after_a_resume(run, stop):
    whole = run()
    first = whole.run_dir / "checkpoints/episode_000001"
    said, _, saved = stop("train 5", resume=str(first), save_episode_interval=None)
    assert saved == []
    assert f"; the last checkpoint is {first}" in said


def test_a_partial_checkpoint_knows_its_updates_and_the_syncs_that_are_due(run, stop):
    settings = {"save_episode_interval": None, "eval_episode_interval": None}
    said, _, saved = stop("train 2", deterministic=False, **settings)
    (checkpoint,) = saved
    assert f"; saved {checkpoint}, partial" in said
    state = read_run_state(checkpoint)
    assert (state.episode, state.is_partial) == (1, True)
    assert state.train_iteration == 3
    # `old` is synced after the third episode, `policy` after each.
    assert state.stale == ("old",)
    assert state.versions == {"policy": 1, "old": 0}
    again = run(resume=str(checkpoint), num_episode=2, deterministic=False, **settings)
    assert [entry["step"] for entry in again.metrics] == [2]


@pytest.mark.parametrize(("moment", "interval"), [("train 2", None), ("train 5", 3)])
def test_where_nothing_exact_can_be_saved_a_deterministic_run_begins_again(
    run, stop, moment, interval
):
    whole = run()
    said, _, saved = stop(moment, save_episode_interval=interval)
    assert saved == []
    assert "nothing is saved" in said
    assert lines(run(resume="auto").run_dir) == lines(whole.run_dir)


def test_a_partial_checkpoint_is_called_so_when_it_is_gone_on_from(run, stop, caplog, capsys):
    _, _, (checkpoint,) = stop("train 5", save_episode_interval=None)
    run(resume=str(checkpoint))
    said = caplog.text + "".join(capsys.readouterr())
    assert f"resuming {checkpoint} after episode 2 (partial" in said
