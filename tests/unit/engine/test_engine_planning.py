"""From flows and a config to the plan of a run, and what cannot be planned."""

from typing import Any

import pytest

from chatlearn import BaseModule, Environment, Evaluator, Trainer
from chatlearn.config import load_config
from chatlearn.engine.components import ParameterSync
from chatlearn.engine.planning import plan_flows, plan_run, synced_in_episode
from chatlearn.errors import ConfigError, FlowError, PlacementError


class Model(BaseModule):
    def forward_step(self, data):
        return data

    def eval_step(self, data):
        return data

    def train_step(self, data):
        return None


def models(*names) -> Any:
    return [Model(name) for name in names]


def build_flows():
    policy, reward, trainer, judge = models("policy", "reward", "trainer", "judge")

    def env_flow(batch):
        return reward.forward_step(policy.forward_step(batch))

    def trainer_flow(batch):
        trainer.train_step(batch)

    parts = (
        Environment(env_flow),
        Trainer(trainer_flow),
        Evaluator(lambda batch: judge.eval_step(policy.eval_step(batch))),
    )
    return plan_flows(*parts, [ParameterSync(trainer, policy)])


def test_the_models_of_all_flows_are_collected_in_order():
    flows = build_flows()
    assert list(flows.modules) == ["policy", "reward", "trainer", "judge"]
    assert flows.trainable == ("trainer",)
    assert flows.syncs == (("trainer", "policy"),)
    graphs = (flows.environment, flows.trainer, flows.evaluator)
    assert [graph.name for graph in graphs if graph] == ["environment", "trainer", "evaluator"]


def test_any_flow_may_be_absent_but_not_all():
    (model,) = models("m")
    evaluator = Evaluator(model.eval_step)
    flows = plan_flows(None, None, evaluator, [])
    assert (flows.environment, flows.trainer, flows.trainable) == (None, None, ())
    with pytest.raises(ConfigError, match="the engine has no flow: give an environment"):
        plan_flows(None, None, None, [])


def test_a_sync_with_a_model_outside_every_flow_is_refused():
    inside, outside = models("inside", "outside")
    message = "set_parameter_sync names model 'outside', which no flow calls; .* call inside"
    with pytest.raises(ConfigError, match=message):
        plan_flows(Environment(inside.forward_step), None, None, [ParameterSync(inside, outside)])


def test_two_syncs_to_one_model_are_refused():
    policy, one, other = models("policy", "one", "other")

    def trainer_flow(batch):
        one.train_step(batch)
        other.train_step(batch)

    pairs = [ParameterSync(one, policy), ParameterSync(other, policy)]
    with pytest.raises(ConfigError, match="gives 'policy' the weights of 'one' and of 'other'"):
        plan_flows(Environment(policy.forward_step), Trainer(trainer_flow), None, pairs)


def test_two_models_of_one_name_in_two_flows_are_refused():
    one, other = models("m", "m")
    with pytest.raises(FlowError, match="two different models are called 'm'"):
        plan_flows(Environment(one.forward_step), Trainer(other.train_step), None, [])


def test_train_step_belongs_in_the_trainer_flow():
    (model,) = models("m")

    def env_flow(batch):
        return model.train_step(batch)

    message = r"return model.train_step\(batch\): train_step belongs in the trainer flow"
    with pytest.raises(FlowError, match=message):
        plan_flows(Environment(env_flow), None, None, [])


def test_a_trainer_flow_trains_something():
    (model,) = models("m")
    with pytest.raises(FlowError, match="the trainer flow calls no train_step"):
        plan_flows(None, Trainer(model.forward_step), None, [])


def test_the_result_of_training_is_no_batch():
    (model,) = models("m")

    def trainer_flow(batch):
        model.train_step(model.train_step(batch))

    with pytest.raises(FlowError, match="takes the result of train_step, which gives metrics"):
        plan_flows(None, Trainer(trainer_flow), None, [])


def test_an_environment_without_output_leaves_nothing_to_train_on():
    (model,) = models("m")

    def env_flow(batch):
        model.forward_step(batch)

    with pytest.raises(FlowError, match="the environment flow returns nothing: return what"):
        plan_flows(Environment(env_flow), Trainer(model.train_step), None, [])


def test_layouts_and_places_follow_the_config():
    config = load_config(
        {
            "models": {
                "policy": {"num_gpu": 4, "tensor_model_parallel_size": 2},
                "trainer": {"num_gpu": 2},
                "reward": {"num_cpu": 1},
            },
            "runtime": {"colocation": ["policy,trainer"]},
        }
    )
    plan = plan_run(build_flows(), config, assume_devices=5)
    found = {r.model_name: (r.num_replicas, r.layout.world_size) for r in plan.requests}
    assert found == {"policy": (2, 2), "reward": (1, 1), "trainer": (1, 2), "judge": (1, 1)}
    assert plan.placement.groups == (("policy", "trainer"), ("reward",), ("judge",))
    with pytest.raises(PlacementError, match="ask for 5 GPUs; there are 4"):
        plan_run(build_flows(), config, assume_devices=4)


def test_a_misspelt_model_name_is_found():
    config = load_config({"models": {"polcy": {"num_gpu": 1}}})
    message = "models.polcy: no flow calls a model of that name; did you mean 'policy'"
    with pytest.raises(ConfigError, match=message):
        plan_run(build_flows(), config, assume_devices=8)


def test_a_configured_model_that_no_flow_calls_takes_no_device():
    config = load_config({"models": {"spare": {"num_gpu": 8}}})
    plan = plan_run(build_flows(), config, assume_devices=4)
    assert "spare" not in {request.model_name for request in plan.requests}


@pytest.mark.parametrize(
    ("episode", "frequency", "expected"),
    [(None, 3, True), (None, 0, True), (0, 1, True), (0, 2, False), (1, 2, True), (5, 0, False)],
)
def test_a_destination_is_synced_at_the_start_and_by_its_frequency(episode, frequency, expected):
    assert synced_in_episode(episode, frequency) is expected


def test_the_local_backend_needs_one_gpu_for_all_models(monkeypatch):
    monkeypatch.setattr("chatlearn.runtime.devices._count_gpus", lambda: 1)
    flows = build_flows()
    names = ("policy", "reward", "trainer", "judge")
    content = {"models": dict.fromkeys(names, {"num_gpu": 1})}
    with pytest.raises(PlacementError, match="the models ask for 4 GPUs; there are 1"):
        plan_run(flows, load_config(content))
    plan = plan_run(flows, load_config({**content, "runtime": {"backend": "local"}}))
    assert {(place.slot.node, place.slot.device) for place in plan.placement.places} == {(0, 0)}
    assert not plan.notes
    asked = {"backend": "local", "colocation": ["policy,trainer"]}
    plan = plan_run(flows, load_config({**content, "runtime": asked}))
    assert plan.notes == ("runtime.colocation: with runtime.backend: local all share one device",)
    assert {(place.slot.node, place.slot.device) for place in plan.placement.places} == {(0, 0)}
