"""Components, engines and data sets that are given wrongly."""

from typing import Any

import pytest

from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from chatlearn.errors import ConfigError, DataError


def flow(batch):
    return batch


@pytest.mark.parametrize("kind", [Environment, Trainer, Evaluator])
def test_a_component_takes_a_flow_function(kind):
    with pytest.raises(ConfigError, match=f"{kind.__name__} takes a flow function .* got str"):
        kind("flow")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("prompts.txt", "data set 0: expected a list of prompts, got str"),
        ({"prompt": "x"}, "data set 0: expected a list of prompts, got dict"),
        (7, "data set 0: expected a list of prompts, got int"),
        ([], "data set 0 is empty: give at least one prompt"),
    ],
)
def test_a_data_set_is_a_list_with_prompts(dataset, message):
    for part in (Environment(flow), Evaluator(flow), Engine()):
        with pytest.raises(DataError, match=message):
            part.set_dataset(dataset)


def test_the_faulty_one_of_several_data_sets_is_named():
    with pytest.raises(DataError, match="Environment data set 1 is empty"):
        Environment(flow).set_multiple_datasets([["a"], []])


def test_setters_are_fluent():
    source, destination = BaseModule("source"), BaseModule("destination")
    environment, trainer, evaluator = Environment(flow), Trainer(flow), Evaluator(flow)
    engine = (
        Engine()
        .set_environment(environment)
        .set_trainer(trainer)
        .set_evaluator(evaluator.set_dataset(["v"]))
        .set_parameter_sync(source, destination)
        .set_dataset(["a", "b"])
    )
    assert isinstance(engine, Engine)
    assert (engine.environment, engine.trainer, engine.evaluator) == (
        environment,
        trainer,
        evaluator,
    )
    assert [(p.source, p.destination) for p in engine.parameter_syncs] == [(source, destination)]
    assert engine.datasets == (["a", "b"],)
    assert evaluator.datasets == (["v"],)


def test_prompts_come_from_the_engine_else_the_environment_else_the_trainer():
    trainer = Trainer(flow).set_dataset(["t"])
    environment = Environment(flow)
    engine = Engine(environment, trainer)
    assert engine.datasets == (["t"],)
    environment.set_dataset(["e"])
    assert engine.datasets == (["e"],)
    engine.set_multiple_datasets([["a"], ["b"]])
    assert engine.datasets == (["a"], ["b"])
    assert Engine().datasets == ()


def test_an_engine_of_an_evaluator_alone_needs_no_prompts():
    assert not Engine(evaluator=Evaluator(flow)).datasets_needed
    assert Engine(trainer=Trainer(flow)).datasets_needed


def test_a_component_in_the_wrong_place_is_refused():
    wrong: Any = Trainer(flow)
    with pytest.raises(ConfigError, match="expected a chatlearn.Environment or None, got Trainer"):
        Engine(wrong)
    with pytest.raises(ConfigError, match="expected a chatlearn.Evaluator or None, got Trainer"):
        Engine().set_evaluator(wrong)


def test_a_model_is_not_synced_with_itself():
    model = BaseModule("policy")
    with pytest.raises(ConfigError, match="parameter sync from 'policy' to itself"):
        Engine().set_parameter_sync(model, model)


def test_the_default_evaluation_metric_is_the_mean_reward():
    evaluator = Evaluator(flow)
    rows = {"policy": [{"text": "a"}], "reward": [{"rewards": 1.0}, {"rewards": 0.0}]}
    assert evaluator.post_process(rows, {}) == {"reward": 0.5}
    assert evaluator.post_process({"policy": [{"text": "a"}]}, {}) == {}
