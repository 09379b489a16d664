"""Corners of flows and their data that a run must get right, in one process."""

from __future__ import annotations

import json
import time

import pytest
import torch

from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import ChatLearnError, DataError, FlowError


class Doubler(BaseModule):
    key = "a"

    def forward_step(self, data):
        return {**data, self.key: [2 * int(x) for x in data["prompt"]]}

    def note(self, data):
        self.log_metrics({"noted": len(data["prompt"])})


class Collector(BaseModule):
    def setup(self):
        self.seen = []

    def train_step(self, data):
        rows = [x for part in data for x in part["prompt"]]
        self.seen.append(rows)
        return {"first": float(rows[0]), "rows": len(rows)}


def train_on(env_flow, collector):
    return Engine(Environment(env_flow), Trainer(lambda batch: collector.train_step(batch)))


def test_a_method_may_stand_at_one_place_in_two_flows(learn_locally):
    a, collector = Doubler("a"), Collector("t")

    def trainer_flow(batch):
        collector.train_step(batch, a.forward_step(batch))

    engine = Engine(Environment(lambda batch: a.forward_step(batch)), Trainer(trainer_flow))
    result = learn_locally(engine.set_dataset([1, 2, 3]), train_global_batch_size=3)
    assert result.metrics[0]["train/t/rows"] == 3


def test_a_call_whose_output_nobody_takes_may_give_none(learn_locally):
    a = Doubler("a")

    def env_flow(batch):
        out = a.forward_step(batch)
        a.note(out)
        return out

    result = learn_locally(Engine(Environment(env_flow)).set_dataset([1, 2]))
    assert [row["a"] for row in result.rollouts] == [2, 4]


def test_a_sample_manager_serves_a_trainer_without_environment(learn_locally):
    collector = Collector("t")
    engine = Engine(None, Trainer(lambda batch: collector.train_step(batch)))
    engine.set_relay_sample_manager(lambda episodes: episodes[-1].buffer[:1])
    result = learn_locally(engine.set_dataset([1, 2, 3]))
    assert result.metrics[0]["train/t/rows"] == 1


def test_a_sample_manager_decides_the_order(learn_locally):
    a, collector = Doubler("a"), Collector("t")
    engine = train_on(lambda batch: a.forward_step(batch), collector).set_dataset(range(1, 7))
    engine.set_relay_sample_manager(
        lambda episodes: sorted(episodes[-1].buffer, key=lambda row: -row["prompt"])
    )
    learn_locally(engine, train_global_batch_size=2, train_micro_batch_size=1)
    assert collector.seen == [[6, 5], [4, 3], [2, 1]]


class Tripler(BaseModule):
    def again(self, data):
        return {**data, "a": [3 * int(x) for x in data["prompt"]]}


def test_returned_values_that_contradict_each_other_are_refused(learn_locally):
    a, c = Doubler("a"), Tripler("c")
    engine = Engine(Environment(lambda batch: (a.forward_step(batch), c.again(batch))))
    with pytest.raises(DataError, match="both give the key 'a'"):
        learn_locally(engine.set_dataset([1, 2]))


def test_an_evaluation_flow_that_returns_nothing_is_refused_before_training(learn_locally):
    a, collector = Doubler("a"), Collector("t")
    engine = train_on(lambda batch: a.forward_step(batch), collector).set_dataset([1])

    def eval_flow(batch):
        a.forward_step(batch)

    engine.set_evaluator(Evaluator(eval_flow).set_dataset([1]))
    with pytest.raises(FlowError, match="evaluation flow returns nothing"):
        learn_locally(engine)


class Changer(BaseModule):
    def forward_step(self, data):
        for row in data["x"]:
            row += 100
        return {"changed": [float(row[0]) for row in data["x"]]}

    def look(self, data):
        return {"seen": [float(row[0]) for row in data["x"]]}


def test_a_module_that_changes_its_input_harms_nobody(learn_locally):
    m = Changer("m")
    rows = [{"x": torch.zeros(1)}, {"x": torch.zeros(2)}]
    engine = Engine(Environment(lambda batch: (m.forward_step(batch), m.look(batch))))
    result = learn_locally(engine.set_dataset(rows), num_episode=2)
    assert [row["seen"] for row in result.rollouts] == [0.0, 0.0]
    assert float(rows[0]["x"]) == 0.0


class Broken(BaseModule):
    def train_step(self, data):
        return {"loss": float("nan")}


def test_a_loss_of_a_plain_module_that_is_not_finite_stops_the_run(learn_locally):
    broken = Broken("t")
    engine = Engine(None, Trainer(lambda batch: broken.train_step(batch))).set_dataset([1])
    with pytest.raises(ChatLearnError, match="the loss is nan"):
        learn_locally(engine)


class Endless(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"prompt": index}


def test_a_torch_dataset_is_read_by_its_length(learn_locally):
    a = Doubler("a")
    engine = Engine(Environment(lambda batch: a.forward_step(batch))).set_dataset(Endless())
    assert [row["a"] for row in learn_locally(engine).rollouts] == [0, 2, 4]


class TokenRewards(BaseModule):
    def forward_step(self, data):
        return {**data, "rewards": torch.ones(len(data["prompt"]), 3), "odd": [float("nan")] * 2}

    def after_episode(self):
        self.log_metrics({"strange": float("inf")})


def test_rewards_of_any_shape_are_rows_like_others(learn_locally):
    m = TokenRewards("m")
    engine = Engine(Environment(lambda batch: m.forward_step(batch))).set_dataset([1, 2])
    result = learn_locally(engine)
    assert result.rollouts[0]["rewards"].shape == (3,)
    line = json.loads((result.run_dir / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line["episode/m/strange"] is None


class Slow(BaseModule):
    def forward_step(self, data):
        time.sleep(0.2)
        return {**data, "response_token_ids": [[1] * 10 for _ in data["prompt"]]}


def test_tokens_per_second_count_every_sample(learn_locally):
    m, collector = Slow("m"), Collector("t")
    engine = train_on(lambda batch: m.forward_step(batch), collector).set_dataset(range(8))
    engine.set_relay_sample_manager(lambda episodes: episodes[-1].buffer[:1])
    result = learn_locally(engine)
    assert 200 < result.metrics[0]["rollout/tokens_per_s"] <= 400


class Texts(Evaluator):
    def post_process(self, results, eval_info):
        return {"verdict": "good"}


def test_metrics_of_an_evaluator_must_be_numbers(learn_locally):
    a = Doubler("a")
    engine = Engine(None, None, Texts(lambda batch: a.forward_step(batch)).set_dataset([1]))
    with pytest.raises(DataError, match="post_process: metrics must be numbers"):
        learn_locally(engine)
