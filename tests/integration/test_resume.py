"""A run that goes on from a checkpoint does what the undisturbed run would have done."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch

import chatlearn
from chatlearn import BaseModule, Engine, Environment, Evaluator
from chatlearn import Trainer as TrainerFlow
from chatlearn.checkpoint.folders import begin_checkpoint
from chatlearn.data.relay import RelaySampleManager
from chatlearn.errors import ConfigError, DataError
from chatlearn.metrics.timings import without_timings

NUM_EPISODES = 4


class Dicer(BaseModule):
    """Answers with weights and dice of every kind."""

    def setup(self):
        self.model = torch.nn.Linear(3, 1)
        self.calls = 0

    def forward_step(self, data):
        self.calls += 1
        count = len(data["prompt"])
        weight = self.model.weight.sum().item()
        return {
            "prompt": data["prompt"],
            "value": torch.rand(count) + weight,
            "dice": [random.random() + float(np.random.rand()) for _ in range(count)],
            "calls": torch.full((count,), float(self.calls)),
        }

    eval_step = forward_step

    def worker_state(self):
        return {"calls": self.calls}

    def restore_worker_state(self, state):
        self.calls = state["calls"]


class Learner(BaseModule):
    """Learns with momentum, dropout, and a schedule of its own."""

    def setup(self):
        torch.manual_seed(7)
        self.model = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.7)

    def train_step(self, data):
        loss = torch.zeros(())
        for part in data:
            inputs = torch.stack([torch.as_tensor(v).float() for v in part["value"]])
            inputs = torch.nn.functional.dropout(inputs.reshape(-1, 1).expand(-1, 3), 0.5)
            loss = loss + (self.model(inputs) - torch.tensor(part["dice"]).mean()).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        rate = self.scheduler.get_last_lr()[0]
        return {"loss": loss.item(), "weight": self.model.weight.sum().item(), "rate": rate}


class Keeper(RelaySampleManager):
    """Trains on what it has kept, too, and counts."""

    def __init__(self):
        super().__init__()
        self.turn = 0

    def __call__(self, episodes):
        self.turn += 1
        self.log_metrics({"turn": self.turn, "kept": len(episodes)})
        return [row for episode in episodes for row in episode.buffer][-9:]

    def state(self):
        return {"turn": self.turn}

    def restore(self, state):
        self.turn = state["turn"]


def build(num_prompts=10):
    policy, old, trainer = Dicer("policy"), Dicer("old"), Learner("trainer")

    def rollout(batch):
        out = policy.forward_step(batch)
        old.forward_step(batch)
        return out

    engine = Engine(
        Environment(rollout),
        TrainerFlow(lambda b: trainer.train_step(b)),
        Evaluator(lambda b: policy.eval_step(b)).set_dataset([1, 2]),
    )
    engine.set_dataset(list(range(num_prompts))).set_relay_sample_manager(Keeper())
    return engine.set_parameter_sync(trainer, policy).set_parameter_sync(trainer, old)


SETTINGS = {
    "num_episode": NUM_EPISODES,
    "sample_per_episode": 4,
    "train_global_batch_size": 3,
    "num_training_epoch": 2,
    "save_episode_interval": 1,
    "eval_episode_interval": 2,
    "max_relay_episode": 2,
    "deterministic": True,
}
MODELS = {"old": {"sync_frequency": 3}}


@pytest.fixture
def run(learn_locally):
    def start(engine=None, **runtime):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        return learn_locally(engine or build(), MODELS, **{**SETTINGS, **runtime})

    return start


def lines(run_dir):
    return [
        json.dumps(without_timings(json.loads(line)))
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]


def weights(run_dir, episode=NUM_EPISODES):
    path = run_dir / f"checkpoints/episode_{episode:06d}/models/trainer/model.pt"
    return path.read_bytes()


@pytest.mark.parametrize("is_async", [True, False])
def test_stopped_after_any_episode_everything_later_is_bit_identical(run, is_async):
    whole = run(async_save=is_async)
    assert whole.metrics[-1]["relay/turn"] == NUM_EPISODES
    for episode in range(1, NUM_EPISODES):
        checkpoint = whole.run_dir / f"checkpoints/episode_{episode:06d}"
        torch.rand(episode)
        again = run(resume=str(checkpoint), async_save=is_async)
        assert lines(again.run_dir) == lines(whole.run_dir)
        assert weights(again.run_dir) == weights(whole.run_dir)
        assert [entry["step"] for entry in again.metrics] == [1, 2, 3, 4]


def test_two_deterministic_runs_write_the_same_metrics_byte_for_byte(run):
    first, second = run(), run()
    assert lines(first.run_dir) == lines(second.run_dir)
    assert weights(first.run_dir) == weights(second.run_dir)


def test_auto_takes_the_newest_good_checkpoint_and_says_what_it_skipped(run, capfd):
    whole = run()
    folder = whole.run_dir / "checkpoints"
    shutil.rmtree(folder / "episode_000004")
    (folder / "episode_000003/models/trainer/model.pt").write_bytes(b"\0")
    capfd.readouterr()
    again = run(resume="auto")
    said = capfd.readouterr().err
    assert f"skipped checkpoint {folder / 'episode_000003'}: " in said
    assert "model.pt has 1 bytes" in said
    assert f"resuming {folder / 'episode_000002'} after episode 2" in said
    assert lines(again.run_dir) == lines(whole.run_dir)


@pytest.mark.parametrize("resume", ["auto", None])
def test_auto_removes_what_dead_runs_left_half_written_and_says_so(run, capfd, resume):
    known = run(num_episode=1).run_dir / "checkpoints"
    dead = begin_checkpoint(known.parent.with_name("killed") / "checkpoints", 2).folder
    live = begin_checkpoint(known.parent.with_name("live") / "checkpoints", 2).folder
    record = dead.parent / ".writer.json"
    writer = json.loads(record.read_text())
    record.write_text(json.dumps({**writer, "start_ticks": writer["start_ticks"] + 1}))
    capfd.readouterr()
    run(resume=resume, num_episode=1)
    said = capfd.readouterr().err
    is_auto = resume == "auto"
    assert (f"removed {dead}, which a run that has ended left half written" in said) == is_auto
    assert (dead.exists(), live.exists()) == (not is_auto, True)


def test_auto_starts_anew_where_there_is_nothing(run, capfd):
    result = run(resume="auto", num_episode=1)
    assert "no checkpoint to resume from: starting anew" in capfd.readouterr().err
    assert len(result.metrics) == 1


def test_a_finished_run_has_nothing_left_to_do(run):
    whole = run()
    again = run(resume="auto")
    assert lines(again.run_dir) == lines(whole.run_dir)


def test_more_episodes_go_on_from_a_finished_run(run):
    short = run(num_episode=2, eval_episode_interval=2)
    longer = run(resume=str(short.run_dir / "checkpoints/episode_000002"))
    assert lines(longer.run_dir) == lines(run().run_dir)


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_starts(run, tmp_path):
    whole = run(num_episode=1)
    checkpoint = whole.run_dir / "checkpoints/episode_000001"
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"runtime.resume: .*nowhere/manifest.json is missing"):
        run(resume=str(tmp_path / "nowhere"))
    other = Learner("other")
    engine = Engine(None, TrainerFlow(lambda b: other.train_step(b))).set_dataset([1])
    with pytest.raises(ConfigError, match="trains trainer; this run trains other"):
        run(engine, resume=str(checkpoint), max_relay_episode=0, eval_episode_interval=None)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(DataError, match=r"data sets have \(10,\) prompts, these have \(11,\)"):
        run(build(11), resume=str(checkpoint))


def test_a_value_that_cannot_be_saved_is_named(run):
    class Strange(Dicer):
        def worker_state(self):
            return {"lock": object()}

    strange, trainer = Strange("policy"), Learner("trainer")
    engine = Engine(
        Environment(lambda b: strange.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    ).set_dataset([1, 2])
    with pytest.raises(chatlearn.errors.ChatLearnError, match=r"\['lock'\] is a object"):
        run(engine, max_relay_episode=0, eval_episode_interval=None)


class Versioned(Dicer):
    """Tells how many weight syncs its weights have seen."""

    def forward_step(self, data):
        self.log_metrics({"version": self.policy_version})
        return super().forward_step(data)


class Sparing(RelaySampleManager):
    """Has nothing to train on in its third episode."""

    turn = 0

    def __call__(self, episodes):
        self.turn += 1
        return [] if self.turn == 3 else list(episodes[-1].buffer)

    def state(self):
        return {"turn": self.turn}

    def restore(self, state):
        self.turn = state["turn"]


def build_versioned():
    policy, old, trainer = Versioned("policy"), Versioned("old"), Learner("trainer")

    def rollout(batch):
        old.forward_step(batch)
        return policy.forward_step(batch)

    engine = Engine(Environment(rollout), TrainerFlow(lambda b: trainer.train_step(b)))
    engine.set_dataset(list(range(10))).set_relay_sample_manager(Sparing())
    return engine.set_parameter_sync(trainer, policy).set_parameter_sync(trainer, old)


@pytest.mark.parametrize("old_frequency", [2, 3])
def test_every_model_keeps_the_version_of_its_weights(learn_locally, old_frequency):
    models = {"policy": {"sync_frequency": 2}, "old": {"sync_frequency": old_frequency}}
    settings = {**SETTINGS, "num_episode": 6, "eval_episode_interval": None}

    def start(**runtime):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        return learn_locally(build_versioned(), models, **{**settings, **runtime})

    whole = start()
    versions = [entry["rollout/policy/version"] for entry in whole.metrics]
    assert versions == [0, 0, 2, 2, 4, 4]
    for episode in range(1, 6):
        again = start(resume=str(whole.run_dir / f"checkpoints/episode_{episode:06d}"))
        assert lines(again.run_dir) == lines(whole.run_dir)
