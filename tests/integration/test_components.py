"""Environment, trainer and evaluator: any of them may be missing, or come later."""

from __future__ import annotations

import json
import os
import signal

import pytest
from toy_modules import Sampler, Scorer, Trainer, read_notes

import chatlearn
from chatlearn import Engine, Environment, Evaluator
from chatlearn import Trainer as TrainerFlow
from chatlearn.engine.run import Terminated
from chatlearn.errors import ConfigError, DataError, FlowError


def test_trainer_alone_trains_on_the_data_set_itself(learn_locally):
    trainer = Trainer("trainer")
    engine = Engine(None, TrainerFlow(lambda batch: trainer.train_step(batch)))
    result = learn_locally(
        engine.set_dataset(list(range(7))), train_global_batch_size=3, train_micro_batch_size=3
    )
    prompts = [note["prompts"] for note in read_notes(result.run_dir, "trainer")[0]]
    assert [len(batch) for batch in prompts] == [3, 3, 1]
    assert sorted(x for batch in prompts for x in batch) == list(range(7))
    assert result.rollouts == []


def test_environment_alone_gives_the_rollouts_back(learn_locally):
    sampler = Sampler("sampler")
    engine = Engine(Environment(lambda b: sampler.forward_step(b)).set_dataset([1, 2, 3]))
    result = learn_locally(engine, data_shuffle=False)
    assert [int(row["answer"]) for row in result.rollouts] == [2, 4, 6]
    assert result.evaluation == {}


def test_evaluator_alone_evaluates_the_engines_data_set(learn_locally):
    sampler, scorer = Sampler("sampler"), Scorer("scorer")

    class Counting(Evaluator):
        def post_process(self, results, eval_info):
            return {"rows": len(results["scorer"]), "episode": eval_info["episode_iteration"]}

    engine = Engine(evaluator=Counting(lambda b: scorer.eval_step(sampler.eval_step(b))))
    result = learn_locally(engine.set_dataset([5, 4, 3]))
    assert [int(row["prompt"]) for row in result.evaluation["scorer"]] == [5, 4, 3]
    assert result.metrics[0]["eval/rows"] == 3.0
    assert result.metrics[0]["eval/episode"] == 0.0


def test_two_returned_values_are_evaluated_by_model(learn_locally):
    sampler, scorer = Sampler("sampler"), Scorer("scorer")

    def eval_flow(batch):
        answers = sampler.eval_step(batch)
        return answers, scorer.eval_step(answers)

    result = learn_locally(Engine(evaluator=Evaluator(eval_flow).set_dataset([1, 2])))
    assert list(result.evaluation) == ["sampler", "scorer"]
    assert [int(row["answer"]) for row in result.evaluation["sampler"]] == [2, 4]
    assert [float(row["rewards"]) for row in result.evaluation["scorer"]] == [1.0, 1.0]


def test_components_set_later_bring_models_that_appear_nowhere_else(learn_locally):
    sampler, trainer, judge = Sampler("sampler"), Trainer("trainer"), Sampler("judge")
    engine = (
        Engine()
        .set_environment(Environment(lambda b: sampler.forward_step(b)))
        .set_trainer(TrainerFlow(lambda b: trainer.train_step(b)))
        .set_evaluator(Evaluator(lambda b: judge.eval_step(b)).set_dataset([9]))
        .set_dataset([1, 2])
    )
    result = learn_locally(engine)
    assert [int(row["answer"]) for row in result.evaluation["judge"]] == [18]
    assert result.metrics[0]["train/trainer/rows"] == 2.0


def test_evaluation_comes_before_training_and_every_so_many_episodes(learn_locally):
    sampler, trainer = Sampler("sampler"), Trainer("trainer")
    engine = Engine(
        Environment(lambda b: sampler.forward_step(b)),
        TrainerFlow(lambda b: trainer.train_step(b)),
        Evaluator(lambda b: sampler.eval_step(b)).set_dataset([1]),
    ).set_dataset([1, 2])
    result = learn_locally(
        engine, num_episode=4, eval_episode_interval=2, enable_eval_before_training=True
    )
    is_evaluated = ["time/eval" in episode for episode in result.metrics]
    assert is_evaluated.count(True) == 3
    assert is_evaluated[-3:] == [True, False, True]


def test_several_data_sets_are_mixed_by_ratio(learn_locally):
    sampler = Sampler("sampler")
    engine = Engine(Environment(lambda b: sampler.forward_step(b)))
    engine.set_multiple_datasets([list(range(6)), list(range(100, 130))])
    result = learn_locally(engine, sample_per_episode=8, data_ratio=[3, 1])
    prompts = [int(row["prompt"]) for row in result.rollouts]
    assert [sum(p < 100 for p in prompts), sum(p >= 100 for p in prompts)] == [6, 2]


def test_the_files_of_the_config_are_read_where_the_program_sets_no_data(learn_locally, tmp_path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "held_out.jsonl"
    train.write_text('{"prompt": 1}\n{"prompt": 2}\n')
    held_out.write_text('{"prompt": 3}\n')
    sampler = Sampler("sampler")
    flow = Environment(lambda b: sampler.forward_step(b))
    engine = Engine(flow, None, Evaluator(lambda b: sampler.eval_step(b)))
    result = learn_locally(engine, data_path=str(train), eval_data_path=str(held_out))
    assert sorted(int(row["answer"]) for row in result.rollouts) == [2, 4]
    assert [int(row["answer"]) for row in result.evaluation["sampler"]] == [6]
    assert (engine.datasets, engine.eval_datasets) == ((), ())


def test_an_engine_without_a_flow_is_refused(learn_locally):
    with pytest.raises(ConfigError, match="has no flow"):
        learn_locally(Engine().set_dataset([1]))


def test_an_engine_without_a_data_set_is_refused(learn_locally):
    sampler = Sampler("sampler")
    with pytest.raises(DataError, match="no data set: call set_dataset"):
        learn_locally(Engine(Environment(lambda b: sampler.forward_step(b))))


def test_an_empty_data_set_is_refused_when_it_is_set():
    with pytest.raises(DataError, match="is empty"):
        Engine().set_dataset([])
    with pytest.raises(DataError, match="is empty"):
        Evaluator(lambda b: b).set_dataset([])


def test_a_flow_without_a_model_is_refused(learn_locally):
    with pytest.raises(FlowError, match="calls no model: call a method of a module"):
        learn_locally(Engine(Environment(lambda _batch: None)).set_dataset([1]))


def test_control_dependencies_order_calls_that_share_no_data(learn_locally):
    first, second = Trainer("first"), Trainer("second")

    def trainer_flow(batch):
        done = first.train_step(batch)
        with chatlearn.ControlDependencies(done):
            second.train_step(batch)

    result = learn_locally(Engine(None, TrainerFlow(trainer_flow)).set_dataset([1, 2]))
    spans = json.loads((result.run_dir / "timeline.json").read_text())["traceEvents"]
    train = [s for s in spans if s.get("ph") == "X" and "train_step" in s["name"]]
    assert len(train) == 2
    assert train[0]["ts"] + train[0]["dur"] <= train[1]["ts"]


def test_methods_of_users_own_and_hooks_are_called(learn_locally):
    class Hooked(Sampler):
        def before_episode(self):
            self.log = ["before"]

        def answer(self, data, iteration, factor=1):
            self.log.append(f"call {iteration}")
            return {"answer": [factor * int(x) for x in data["text"]]}

        def after_episode(self):
            self.log_metrics({"calls": len(self.log)})

        def build_dataset(self, prompts, is_eval=False):
            return [{"text": prompt} for prompt in prompts]

    hooked = Hooked("hooked")
    engine = Engine(Environment(lambda b: hooked.answer(b, factor=7))).set_dataset([1, 2, 3])
    result = learn_locally(engine, generation_batch_size=2, data_shuffle=False)
    assert [int(row["answer"]) for row in result.rollouts] == [7, 14, 21]
    assert result.metrics[0]["episode/hooked/calls"] == 3.0


def test_sigterm_ends_the_run_at_the_next_chance_with_a_checkpoint(learn_locally, tmp_path):
    class Terminating(Trainer):
        def train_step(self, data, iteration):
            if iteration == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().train_step(data, iteration)

    calls = []

    class Counted(Sampler):
        def forward_step(self, data):
            calls.append(len(data["prompt"]))
            return super().forward_step(data)

    sampler, trainer = Counted("sampler"), Terminating("trainer")
    engine = Engine(
        Environment(lambda b: sampler.forward_step(b)), TrainerFlow(lambda b: trainer.train_step(b))
    ).set_dataset(list(range(20)))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match="saved .*episode_000001"):
        learn_locally(
            engine, generation_batch_size=1, train_global_batch_size=1, train_micro_batch_size=1
        )
    assert len(calls) < 10
    assert len(list(tmp_path.glob("chatlearn/*/checkpoints/episode_000001/run_state.json"))) == 1
    assert signal.getsignal(signal.SIGTERM) == before


def test_rows_of_a_data_set_are_cut_to_micro_batches_by_their_tokens(learn_locally):
    rows = [{"prompt": at, "prompt_token_ids": list(range(at + 1))} for at in range(5)]
    trainer = Trainer("trainer")
    engine = Engine(trainer=TrainerFlow(lambda batch: trainer.train_step(batch))).set_dataset(rows)
    result = learn_locally(engine, train_micro_batch_tokens=6, data_shuffle=False)
    ((note,),) = read_notes(result.run_dir, "trainer")
    tokens = [sum(prompt + 1 for prompt, _ in part) for part in note["ids"]]
    assert tokens == [5, 5, 5]
