"""What a run reports: every number from where it is true."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from toy_modules import Doubler, Sampler, Trainer

from chatlearn import BaseModule, Engine, Environment, RLHFEngine
from chatlearn import Trainer as TrainerFlow
from chatlearn.errors import ChatLearnError


class Reward(BaseModule):
    def forward_step(self, data):
        return {**data, "rewards": torch.ones(len(data["prompt"]))}


class Shaper(BaseModule):
    def forward_step(self, data):
        return {**data, "rewards": data["rewards"] - 3}

    def passes_on(self, data):
        return data


def test_the_reward_is_that_of_the_rows_that_are_trained_on(learn_locally):
    reward, shaper = Reward("reward"), Shaper("shaper")

    def env_flow(batch):
        given = reward.forward_step(batch)
        shaped = shaper.passes_on(shaper.forward_step(given))
        shaper.passes_on(given)
        return shaped

    result = learn_locally(Engine(Environment(env_flow)).set_dataset([1, 2, 3]))
    assert float(result.rollouts[0]["rewards"]) == -2.0
    assert result.metrics[0]["rollout/reward"] == -2.0


class Counting(Sampler):
    def after_episode(self):
        self.log_metrics({"replica": self.replica_id + 1.0})


def test_what_is_logged_after_an_episode_is_averaged_over_the_workers(learn):
    sampler = Counting("sampler")
    engine = Engine(Environment(lambda b: sampler.forward_step(b))).set_dataset([1, 2])
    result = learn(engine, {"sampler": {"num_gpu": 2}})
    assert result.metrics[0]["episode/sampler/replica"] == 1.5


class Reader(Sampler):
    """A sampler whose rows have tokens, and that computes something."""

    def forward_step(self, data):
        torch.ones(64, 64) @ torch.ones(64, 64)
        count = len(data["prompt"])
        return {
            **super().forward_step(data),
            "prompt_token_ids": [[1, 2]] * count,
            "response_token_ids": [[3, 4, 5]] * count,
        }


class ExpTrainer(Trainer):
    def train_step(self, data, iteration):
        torch.ones(64, 64).exp()
        return super().train_step(data, iteration)


@pytest.mark.parametrize("backend", ["learn_locally", "learn"])
def test_a_profile_shows_the_kernels_of_every_stage_of_one_episode(backend, request):
    reader, trainer = Reader("reader"), ExpTrainer("trainer")
    engine = Engine(
        Environment(lambda b: reader.forward_step(b)),
        TrainerFlow(lambda b: trainer.train_step(b)),
    ).set_dataset([1, 2, 3, 4])
    models = {"reader": {"num_gpu": 2}} if backend == "learn" else {}
    run = request.getfixturevalue(backend)
    result = run(engine, models, num_episode=3, profile=True, sample_per_episode=4)
    folder = result.run_dir / "profile"
    ranks = ["reader.0", "reader.1"] if models else ["reader.0"]
    names = {f"{name}.json" for name in [*ranks, "trainer.0"]}
    assert {path.name for path in folder.iterdir()} == {"summary.txt", *names}
    span = spans(result, "train_step")[1]
    trace = json.loads((folder / "trainer.0.json").read_text())["traceEvents"]
    for metrics in result.metrics:
        assert 0.0 < metrics["time/critical_path"] <= metrics["time/episode"]
        assert 0.0 <= metrics["engine_overhead"] < 1.0
    (kernel,) = [event for event in trace if event.get("name") == "aten::exp"]
    # Of the second episode, on the clock of the timeline.
    assert span["ts"] - 1e3 <= kernel["ts"] <= span["ts"] + span["dur"] + 1e3
    summary = (folder / "summary.txt").read_text()
    assert f"on the longest of {len(ranks)} ranks, {len(ranks)} calls, 20 tokens" in summary
    assert "reader.forward_step" in summary
    assert "trainer.train_step" in summary
    assert "aten::mm" in summary


def test_nothing_is_profiled_unless_it_is_asked_for(learn_locally):
    sampler = Sampler("sampler")
    engine = Engine(Environment(lambda b: sampler.forward_step(b))).set_dataset([1, 2])
    assert not (learn_locally(engine).run_dir / "profile").exists()


class Preparing(Trainer):
    needs_whole_episode = True

    def wants_whole_episode(self, columns):
        return "answer" in columns

    def prepare_episode(self, batches):
        self.log_metrics({"prepared": len(batches)})


def spans(result, name):
    events = json.loads((result.run_dir / "timeline.json").read_text())["traceEvents"]
    return [event for event in events if event.get("ph") == "X" and name in event["name"]]


def build_preparing(environment):
    trainer = Preparing("trainer")
    return Engine(environment, TrainerFlow(lambda b: trainer.train_step(b))).set_dataset([1, 2, 3])


def test_preparing_an_episode_is_a_stage_like_others(learn_locally):
    sampler = Sampler("sampler")
    engine = build_preparing(Environment(lambda b: sampler.forward_step(b)))
    result = learn_locally(engine, train_global_batch_size=1, train_micro_batch_size=1)
    assert result.metrics[0]["train/trainer/prepared"] == 3.0
    assert result.metrics[0]["time/train/trainer.prepare_episode"] >= 0
    assert len(spans(result, "prepare_episode")) == 1


def test_an_episode_is_prepared_only_where_its_columns_ask_for_it(learn_locally):
    result = learn_locally(build_preparing(None), train_global_batch_size=1)
    assert "train/trainer/prepared" not in result.metrics[0]
    assert spans(result, "prepare_episode") == []


def test_the_first_sync_and_the_seconds_of_saving_are_reported(learn_locally):
    sampler, trainer = Sampler("sampler"), Trainer("trainer")
    engine = Engine(
        Environment(lambda b: sampler.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    )
    engine.set_parameter_sync(trainer, sampler).set_dataset([1, 2])
    result = learn_locally(engine, num_episode=2, save_episode_interval=2)
    first, second = result.metrics
    assert first["sync/sampler/bytes_at_start"] == first["sync/sampler/bytes"]
    assert "sync/sampler/bytes_at_start" not in second
    assert ["time/save" in metrics for metrics in (first, second)] == [False, True]


class Logging(Trainer):
    def __init__(self, name, returned, logged):
        super().__init__(name)
        self.returned, self.logged = returned, logged

    def train_step(self, data):
        self.log_metrics(self.logged)
        return self.returned


@pytest.mark.parametrize(
    ("returned", "logged", "name"),
    [
        ({"policy_loss": float("nan")}, {}, "policy_loss"),
        ({"Loss": torch.tensor(float("inf"))}, {}, "Loss"),
        (None, {"loss": float("nan")}, "loss"),
        ({"loss": 1.0}, {"grad_norm": float("inf")}, "gradient norm"),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_however_it_is_told(
    learn_locally, returned, logged, name
):
    trainer = Logging("trainer", returned, logged)
    engine = Engine(None, TrainerFlow(lambda b: trainer.train_step(b))).set_dataset([1])
    with pytest.raises(ChatLearnError, match=f"NumericsError: model 'trainer': the {name} is"):
        learn_locally(engine)


def test_an_episode_that_a_sample_manager_leaves_out_is_not_trained_on(learn_locally, caplog):
    sampler, trainer = Sampler("sampler"), Trainer("trainer")
    engine = Engine(
        Environment(lambda b: sampler.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    )
    engine.set_parameter_sync(trainer, sampler).set_dataset([1, 2])
    engine.set_relay_sample_manager(lambda e: [] if e[-1].episode_id == 1 else e[-1].buffer)
    with caplog.at_level(logging.WARNING, "chatlearn"):
        result = learn_locally(engine, num_episode=3, save_episode_interval=3)
    assert [metrics["relay/skipped"] for metrics in result.metrics] == [0.0, 1.0, 0.0]
    assert ["train/trainer/rows" in metrics for metrics in result.metrics] == [True, False, True]
    assert "episode 2 is not trained on: the sample manager gave no rows" in caplog.text
    state = json.loads(next(result.run_dir.glob("checkpoints/*/run_state.json")).read_text())
    assert (state["episode"], state["train_iteration"]) == (3, 2)


class Critic(BaseModule):
    def forward_step(self, data):
        return {**data, "values": [0.5] * len(data["prompt"])}


class Forgetful(BaseModule):
    """A reward that gives its own column only, and has no `eval_step`."""

    def forward_step(self, data):
        return {"rewards": [1.0] * len(data["prompt"])}


class Learner(BaseModule):
    def train_step(self, data):
        return {"value": sum(sum(part["values"]) for part in data)}


def test_a_reward_need_not_pass_values_on_nor_evaluate(learn_locally, caplog):
    engine = RLHFEngine(
        policy=Sampler("policy"),
        reference=Doubler("reference"),
        reward=Forgetful("reward"),
        value=Critic("value"),
        policy_trainer=Trainer("policy_trainer"),
        value_trainer=Learner("value_trainer"),
    )
    engine.parameter_syncs.clear()
    with caplog.at_level(logging.WARNING, "chatlearn"):
        result = learn_locally(engine.set_dataset([1, 2]))
    assert result.metrics[0]["train/value_trainer/value"] == 1.0
    assert caplog.text == ""
