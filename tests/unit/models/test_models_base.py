"""BaseModule's defaults, and how its methods are called in a worker."""

import pytest

from chatlearn.config import load_config
from chatlearn.errors import ChatLearnError, ConfigError, FlowError
from chatlearn.models.base import BaseModule
from chatlearn.models.dotted_path import load_object
from chatlearn.models.invoke import invoke, invoke_prepare_episode
from chatlearn.parallel.layout import ParallelLayout


class Model(BaseModule):
    def refine(self, data, iteration):
        return (data, iteration, self.row_ids, self.iteration)

    def plain(self, data, scale=1):
        return (data, scale)

    def prepare_episode(self, batches):
        self.seen = (batches, self.row_ids)

    def fail(self, data):
        raise ValueError("mine")


def run(module, method, **constants):
    return invoke(module, method, {"x": 1}, row_ids=("r",), iteration=4, constants=constants)


def test_the_default_data_set_keeps_mappings_and_names_prompts():
    found = BaseModule("m").build_dataset([{"a": 1}, "text", 3])
    assert found == [{"a": 1}, {"prompt": "text"}, {"prompt": 3}]


@pytest.mark.parametrize("method", ["forward_step", "train_step", "eval_step"])
def test_a_step_that_is_not_there_is_named(method):
    with pytest.raises(FlowError, match=f"model 'm' has no {method}: define it in BaseModule"):
        getattr(BaseModule("m"), method)({})


def test_a_method_gets_iteration_and_row_ids_during_the_call():
    module = Model("m")
    assert run(module, "refine") == ({"x": 1}, 4, ("r",), 4)
    assert module.row_ids == ()
    assert run(module, "refine", iteration=9)[1] == 9
    assert run(module, "plain", scale=3) == ({"x": 1}, 3)


def test_row_ids_are_forgotten_after_an_error():
    module = Model("m")
    with pytest.raises(ValueError, match="mine"):
        run(module, "fail")
    assert module.row_ids == ()


def test_a_method_that_is_not_there_is_named():
    with pytest.raises(ChatLearnError, match="model 'm' has no method 'score'"):
        run(Model("m"), "score")


def test_a_trainer_sees_the_episode_with_its_row_ids():
    module = Model("m")
    invoke_prepare_episode(module, [[{"x": 1}]], [[["r"]]])
    assert module.seen == ([[{"x": 1}]], [[["r"]]])
    assert module.row_ids == ()


def test_metrics_are_handed_over_once_the_last_value_counts():
    module = Model("m")
    module.log_metrics({"kl": 1})
    module.log_metrics({"kl": 2, "loss": 3.5})
    assert module.take_metrics() == {"kl": 2.0, "loss": 3.5}
    assert module.take_metrics() == {}


def test_a_plain_module_knows_its_weights_only_once_it_lives():
    config = load_config({"models": {"policy": {}}}).model("policy")
    assert BaseModule("policy").planned_weight_shards(config, ParallelLayout()) is None


def test_a_weight_sync_sets_the_policy_version():
    module = Model("m")
    module.after_weight_sync(3)
    assert module.policy_version == 3


def test_an_object_is_found_by_its_dotted_path():
    assert load_object("chatlearn.models.base:BaseModule", "models.m.module") is BaseModule


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("json.loads", "models.m.module: expected `package.module:name`, got 'json.loads'"),
        (":loads", "expected `package.module:name`"),
        ("no_such_package.x:y", "module 'no_such_package.x' cannot be imported.*PYTHONPATH"),
        ("json:no_such", "module 'json' has no 'no_such'"),
    ],
)
def test_a_dotted_path_that_leads_nowhere_names_the_key(path, message):
    with pytest.raises(ConfigError, match=message):
        load_object(path, "models.m.module")
