"""Every row reaches each consumer once, whatever the replica counts and batch sizes."""

from __future__ import annotations

import json
import time

from toy_modules import Doubler, Sampler, Scorer, Trainer, read_notes, trained_batches

from chatlearn import BaseModule, Engine, Environment, Evaluator
from chatlearn import Trainer as TrainerFlow

PROMPTS = list(range(35))


def test_rows_stay_joined_over_2_4_2_replicas_and_odd_batches(learn):
    sampler, scorer, doubler = Sampler("sampler"), Scorer("scorer"), Doubler("doubler")

    def env_flow(batch):
        answers = sampler.forward_step(batch)
        scores = scorer.forward_step(answers)
        return answers, scores, doubler.forward_step(batch, scores)

    models = {"sampler": {"num_gpu": 2}, "scorer": {"num_gpu": 4}, "doubler": {"num_gpu": 2}}
    engine = Engine(Environment(env_flow)).set_dataset(PROMPTS)
    result = learn(engine, models, generation_batch_size=3, num_samples_per_prompt=2)

    rows = result.rollouts
    assert len(rows) == 70
    assert sorted(int(row["prompt"]) for row in rows) == sorted(PROMPTS * 2)
    assert [row["sample"] for row in rows] == [0, 1] * 35
    assert all(int(rows[i]["prompt"]) == int(rows[i + 1]["prompt"]) for i in range(0, 70, 2))
    assert all(int(row["answer"]) == 2 * int(row["prompt"]) for row in rows)
    assert all(int(row["checked"]) == 3 * int(row["prompt"]) for row in rows)
    assert all(float(row["rewards"]) == 1.0 for row in rows)
    assert {int(row["replica"]) for row in rows} == {0, 1}
    # Three rows would tear a prompt's two samples apart.
    assert max(int(row["rows"]) for row in rows) == 2


def test_81_evaluation_rows_over_3_replicas_come_once_each_in_order(learn):
    sampler = Sampler("sampler")
    evaluator = Evaluator(lambda batch: sampler.eval_step(batch)).set_dataset(list(range(81)))
    result = learn(
        Engine(None, None, evaluator), {"sampler": {"num_gpu": 3}}, generation_batch_size=4
    )
    rows = result.evaluation["sampler"]
    assert [int(row["prompt"]) for row in rows] == list(range(81))
    assert [int(row["answer"]) for row in rows] == list(range(0, 162, 2))


def test_trainers_of_different_dp_sizes_see_the_same_batches(learn):
    sampler, one, two = Sampler("sampler"), Trainer("one"), Trainer("two")

    def trainer_flow(batch):
        one.train_step(batch)
        two.train_step(batch)

    engine = Engine(Environment(lambda b: sampler.forward_step(b)), TrainerFlow(trainer_flow))
    result = learn(
        engine.set_dataset(PROMPTS),
        {"two": {"num_gpu": 2}},
        num_episode=5,
        sample_per_episode=8,
        generation_batch_size=3,
        train_global_batch_size=7,
        train_micro_batch_size=1,
    )
    batches = trained_batches(result.run_dir, "one")
    assert batches == trained_batches(result.run_dir, "two")
    assert [len(batch) for batch in batches] == [7, 1] * 5
    assert [i for batch in batches for i in batch] == [(number, 0) for number in range(40)]
    prompts = [x for note in read_notes(result.run_dir, "one")[0] for x in note["prompts"]]
    assert sorted(prompts[:35]) == PROMPTS
    assert [note["lane"] for notes in read_notes(result.run_dir, "two") for note in notes] == [
        *[0] * 10,
        *[1] * 10,
    ]


def _prompts_by_batch(learn_locally, **runtime):
    sampler, trainer = Sampler("sampler"), Trainer("trainer")
    engine = Engine(
        Environment(lambda b: sampler.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    )
    result = learn_locally(
        engine.set_dataset(PROMPTS),
        num_episode=2,
        sample_per_episode=8,
        train_global_batch_size=3,
        **runtime,
    )
    return [note["prompts"] for note in read_notes(result.run_dir, "trainer")[0]]


def test_training_batches_do_not_depend_on_the_generation_batch_size(learn_locally):
    small = _prompts_by_batch(learn_locally, generation_batch_size=1)
    large = _prompts_by_batch(learn_locally, generation_batch_size=7)
    assert small == large
    assert [len(batch) for batch in small] == [3, 3, 2, 3, 3, 2]


def test_later_training_epochs_see_every_row_again(learn_locally):
    batches = _prompts_by_batch(learn_locally, num_training_epoch=2, training_shuffle_mode="sample")
    first, second = batches[:3], batches[3:6]
    assert sorted(x for batch in first for x in batch) == sorted(
        x for batch in second for x in batch
    )
    assert first != second


class _Slow(Sampler):
    """The last micro-batch waits until a trainer has trained, at most 20 s."""

    def forward_step(self, data):
        if (7, 0) in self.row_ids:
            deadline = time.monotonic() + 20
            while not list(self.run_dir.glob("trainer.*.jsonl")) and time.monotonic() < deadline:
                time.sleep(0.05)
        return super().forward_step(data)


def test_fixed_trains_while_rollouts_still_run(learn):
    sampler, trainer = _Slow("sampler"), Trainer("trainer")
    engine = Engine(
        Environment(lambda b: sampler.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    )
    result = learn(
        engine.set_dataset(PROMPTS),
        sample_per_episode=8,
        generation_batch_size=2,
        train_global_batch_size=2,
    )
    spans = json.loads((result.run_dir / "timeline.json").read_text())["traceEvents"]
    complete = [span for span in spans if span.get("ph") == "X"]
    train_start = min(s["ts"] for s in complete if "train_step" in s["name"])
    rollout_end = max(s["ts"] + s["dur"] for s in complete if "forward_step" in s["name"])
    assert train_start < rollout_end
    assert result.metrics[0]["time/rollout"] < 15


def test_dynamic_hands_past_episodes_to_the_sample_manager(learn_locally):
    seen = []

    def keep_even(episodes):
        seen.append([(e.episode_id, len(e.buffer)) for e in episodes])
        rows = [row for episode in episodes for row in episode.buffer]
        return [row for row in rows if int(row["prompt"]) % 2 == 0]

    sampler, trainer = Sampler("sampler"), Trainer("trainer")
    engine = Engine(
        Environment(lambda b: sampler.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    ).set_relay_sample_manager(keep_even)
    result = learn_locally(
        engine.set_dataset(PROMPTS),
        num_episode=3,
        sample_per_episode=8,
        stream_data_loader_type="dynamic",
        max_relay_episode=2,
    )
    assert seen == [[(0, 8)], [(0, 8), (1, 8)], [(1, 8), (2, 8)]]
    prompts = [note["prompts"] for note in read_notes(result.run_dir, "trainer")[0]]
    assert all(x % 2 == 0 for batch in prompts for x in batch)
    assert len(prompts) == 3


class Halves(BaseModule):
    def forward_step(self, data):
        return {**data, self.name: [2 * int(x) for x in data["prompt"]]}


class Checker(BaseModule):
    def train_step(self, data):
        for part in data:
            assert part["a"] == part["b"] == [2 * int(x) for x in part["prompt"]]
        return {"rows": sum(len(part["prompt"]) for part in data)}


def test_outputs_cut_differently_join_on_lanes_without_rows(learn):
    a, b, t = Halves("a"), Halves("b"), Checker("t")
    engine = Engine(
        Environment(lambda batch: (a.forward_step(batch), b.forward_step(batch))),
        TrainerFlow(lambda batch: t.train_step(batch)),
    )
    models = {
        "a": {"generation_batch_size": 4},
        "b": {"generation_batch_size": 3},
        "t": {"num_gpu": 3},
    }
    runtime = {"train_global_batch_size": 3, "train_micro_batch_size": 1, "deterministic": True}
    result = learn(engine.set_dataset(list(range(10))), models, **runtime)
    assert result.metrics[0]["train/t/rows"] > 0
