"""Weights of plain modules on their way from a trainer to its inference twin."""

from __future__ import annotations

import pytest
import torch
from toy_modules import Sampler, Trainer

from chatlearn import Engine, Environment, Evaluator
from chatlearn import Trainer as TrainerFlow
from chatlearn.errors import SyncError, WorkerError


def trained_weight(num_updates, mean):
    """The sum of a Trainer's weights after updates that add `mean` to each of six."""
    torch.manual_seed(7)
    weight = torch.nn.Linear(3, 2).weight.detach()
    for _ in range(num_updates):
        weight = weight + mean
    return weight.sum().item()


def build_engine(sampler, trainer):
    return (
        Engine(
            Environment(lambda b: sampler.forward_step(b)),
            TrainerFlow(lambda b: trainer.train_step(b)),
            Evaluator(lambda b: sampler.eval_step(b)).set_dataset([1, 2, 3, 4]),
        )
        .set_parameter_sync(trainer, sampler)
        .set_dataset([2, 4, 6, 8])
    )


def test_every_replica_gets_the_trainers_bits(learn):
    engine = build_engine(Sampler("sampler"), Trainer("trainer"))
    result = learn(
        engine,
        {"sampler": {"num_gpu": 2}, "trainer": {"num_gpu": 2}},
        num_episode=2,
        generation_batch_size=1,
        validate_param_sync=True,
    )
    rows = result.evaluation["sampler"]
    assert {int(row["replica"]) for row in rows} == {0, 1}
    assert {float(row["weight"]) for row in rows} == {trained_weight(2, 5.0)}
    assert result.metrics[-1]["sync/sampler/bytes"] == 2 * (6 + 2) * 4


@pytest.mark.parametrize(
    ("frequency", "updates_seen"), [(0, [0, 0, 0, 0]), (1, [1, 2, 3, 4]), (2, [0, 2, 2, 4])]
)
def test_sync_frequency_decides_in_which_episodes_weights_move(
    learn_locally, frequency, updates_seen
):
    engine = build_engine(Sampler("sampler"), Trainer("trainer"))
    seen = []

    class Recorder(Evaluator):
        def post_process(self, results, eval_info):
            seen.append(float(results["sampler"][0]["weight"]))
            return {}

    engine.set_evaluator(Recorder(engine.evaluator.model_flow).set_dataset([1]))
    learn_locally(
        engine,
        models={"sampler": {"sync_frequency": frequency}},
        num_episode=4,
        eval_episode_interval=1,
    )
    assert seen == [trained_weight(count, 5.0) for count in updates_seen]


def test_the_first_rollout_uses_the_trainers_weights(learn_locally):
    class Checked(Trainer):
        def train_step(self, data, iteration):
            return {"weight": float(data[0]["weight"][0])}

    result = learn_locally(build_engine(Sampler("sampler"), Checked("trainer")))
    assert result.metrics[0]["train/trainer/weight"] == pytest.approx(trained_weight(0, 0.0))


def test_models_of_different_shapes_cannot_be_synced(learn_locally):
    class Wide(Sampler):
        def setup(self):
            self.model = torch.nn.Linear(4, 2)

    with pytest.raises(SyncError, match="weight"):
        learn_locally(build_engine(Wide("sampler"), Trainer("trainer")))


def test_a_module_without_a_model_cannot_be_synced(learn_locally):
    class Empty(Sampler):
        def setup(self):
            pass

    with pytest.raises(WorkerError, match="'sampler' takes part in a parameter sync"):
        learn_locally(build_engine(Empty("sampler"), Trainer("trainer")))


class Headed(Trainer):
    """A trainer with a weight that its sampler has no place for."""

    def setup(self):
        super().setup()
        self.model.register_buffer("head", torch.zeros(3))


class Headless(Sampler):
    left_out_weights = ("head",)


def test_a_weight_that_the_sampler_has_no_place_for_is_refused(learn_locally):
    message = r"sampler has no place for head of trainer.r0.0: .* left_out_weights of sampler"
    with pytest.raises(SyncError, match=message):
        learn_locally(build_engine(Sampler("sampler"), Headed("trainer")))


def test_a_sampler_may_say_which_weights_it_does_without(learn_locally):
    result = learn_locally(build_engine(Headless("sampler"), Headed("trainer")), num_episode=1)
    assert result.metrics[-1]["sync/sampler/bytes"] == (6 + 2) * 4
