"""Settings that nothing would heed are refused when the run is planned."""

import pytest

from chatlearn import BaseModule, Engine, Environment, Evaluator, GRPOEngine, Trainer
from chatlearn.config import load_config
from chatlearn.data.relay import RelaySampleManager
from chatlearn.engine.sample_managers import GroupAdvantageManager
from chatlearn.errors import ConfigError


class Model(BaseModule):
    def forward_step(self, data):
        return data

    def train_step(self, data):
        return None


class Judge(Model):
    def eval_step(self, data):
        return data


def build_engine(evaluator=None):
    model = Model("m")
    return Engine(Environment(model.forward_step), Trainer(model.train_step), evaluator)


def plan(engine, **runtime):
    return engine.plan(load_config({"runtime": {"backend": "local", **runtime}}))


@pytest.mark.parametrize(
    ("runtime", "message"),
    [
        ({"enable_eval_before_training": True}, "enable_eval_before_training: the engine lacks an"),
        ({"eval_episode_interval": 2}, "eval_episode_interval=2: the engine lacks an evaluator"),
        ({"eval_data_path": "a.txt"}, "eval_data_path: the engine has no evaluator"),
        ({"max_relay_episode": 2}, "max_relay_episode=2: there is no sample manager"),
        ({"max_relay_episode": -1, "relay_episode_offset": 1}, "there is no sample manager"),
        ({"relay_episode_offset": 1}, "relay_episode_offset=1: no past episode is kept"),
    ],
)
def test_what_no_part_of_the_engine_heeds_is_refused(runtime, message):
    with pytest.raises(ConfigError, match=message):
        plan(build_engine(), **runtime)


def test_an_evaluator_without_data_evaluates_nothing():
    engine = build_engine(Evaluator(Judge("judge").eval_step))
    with pytest.raises(ConfigError, match=r"lacks evaluation data: call evaluator.set_dataset"):
        plan(engine, eval_episode_interval=2)
    assert plan(engine, eval_episode_interval=0).flows.evaluator is not None
    assert plan(engine, eval_episode_interval=2, eval_data_path="held_out.txt")


def test_past_episodes_are_for_managers_that_use_them():
    engine = build_engine().set_relay_sample_manager(RelaySampleManager())
    assert plan(engine, max_relay_episode=3, relay_episode_offset=1)
    engine.set_relay_sample_manager(GroupAdvantageManager())
    with pytest.raises(ConfigError, match="GroupAdvantageManager trains on the newest episode"):
        plan(engine, max_relay_episode=3)
    assert plan(engine, max_relay_episode=1)


def test_a_trainers_data_set_beside_that_of_the_environment_is_refused():
    engine = build_engine()
    assert engine.trainer is not None
    engine.trainer.set_dataset([1])
    assert plan(engine)
    with pytest.raises(ConfigError, match=r"Trainer.set_dataset: the trainer trains on the sampl"):
        plan(engine.set_dataset([2]))


def test_an_evaluator_alone_may_have_the_configuration_of_its_training():
    engine = Engine(evaluator=Evaluator(Judge("judge").eval_step))
    assert plan(engine, max_relay_episode=2, eval_episode_interval=2)


def build_grpo(kind=Model):
    return GRPOEngine(Model("policy"), Model("reference"), kind("reward"), Model("policy_trainer"))


def test_a_built_in_engine_looks_at_its_evaluation_only_where_there_is_data():
    assert plan(build_grpo()).flows.evaluator is None
    with pytest.raises(Exception, match="reward.eval_step|policy.eval_step"):
        plan(build_grpo(), eval_data_path="held_out.txt")
