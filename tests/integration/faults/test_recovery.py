"""Workers die at every stage, and the run ends as if nothing had happened."""

from __future__ import annotations

import json

import fault_modules as faults
import pytest

from chatlearn.errors import WorkerError
from chatlearn.metrics.timings import without_timings

pytestmark = pytest.mark.alone

MODELS = {"policy": {"num_gpu": 2}}


@pytest.fixture(scope="module")
def undisturbed(request):
    """What the run does by itself; filled by the first test that asks."""
    return {}


@pytest.fixture
def run(learn, tmp_path):
    def start(moment=None, kind="kill", models=MODELS, **runtime):
        folder = tmp_path / "moments"
        folder.mkdir(exist_ok=True)
        if moment is not None:
            faults.plan_fault(folder, moment, kind)
        engine = faults.build(folder)
        return learn(engine, models, **{**faults.SETTINGS, "sync_timeout_s": 20, **runtime})

    return start


def account(result):
    """Everything that must not depend on faults."""
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines()
    metrics = [without_timings(json.loads(line)) for line in lines]
    evaluation = [float(row["rewards"]) for row in result.evaluation["policy"]]
    return {"metrics": metrics, "rows": faults.trained(result.run_dir), "eval": evaluation}


def recoveries(result):
    path = result.run_dir / "recoveries.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("moment", "kind", "how"),
    [
        ("policy.forward", "kill", "in_place"),
        ("trainer.train2", "kill", "roll_back"),
        pytest.param("reward.forward", "kill", "in_place", marks=pytest.mark.long),
        pytest.param("policy.eval", "kill", "in_place", marks=pytest.mark.long),
        pytest.param("policy.sync2", "kill", "roll_back", marks=pytest.mark.long),
        pytest.param("trainer.save", "kill", "roll_back", marks=pytest.mark.long),
        pytest.param("reward.forward", "stop", "in_place", marks=pytest.mark.long),
        pytest.param("trainer.train3", "stop", "roll_back", marks=pytest.mark.long),
    ],
)
def test_the_run_ends_as_if_nothing_had_happened(run, undisturbed, moment, kind, how):
    if not undisturbed:
        undisturbed.update(account(run()))
    result = run(moment, kind)
    assert account(result) == undisturbed
    (recovery,) = recoveries(result)
    assert recovery["kind"] == how
    assert recovery["model"] == moment.partition(".")[0]
    assert recovery["lost_s"] >= 0
    assert recovery["recovery_s"] > 0


@pytest.mark.long
def test_the_only_replica_waits_for_its_trainer_or_goes_back(run, undisturbed):
    if not undisturbed:
        undisturbed.update(account(run()))
    result = run("policy.forward2", models={"policy": {"num_gpu": 1}})
    assert account(result)["rows"] == undisturbed["rows"]
    assert len(recoveries(result)) == 1


def test_what_user_code_raises_is_never_tried_again(run):
    with pytest.raises(WorkerError, match="told to raise"):
        run("reward.forward", "raise")


@pytest.mark.long
def test_without_restarts_a_death_ends_the_run(run):
    with pytest.raises(WorkerError, match="the worker process died"):
        run("reward.forward", "kill", max_restarts=0)


class CountingReward(faults.HurtReward):
    """Adds how many rows it has seen, which nothing but a checkpoint knows."""

    def setup(self):
        self.count = 0

    def worker_state(self):
        return {"count": self.count}

    def restore_worker_state(self, state):
        self.count = state["count"]

    def forward_step(self, data):
        self.suffer(f"forward{self.count}")
        self.count += len(data["answer"])
        return {**data, "rewards": [value + self.count for value in data["answer"]]}


def test_a_module_with_a_state_of_its_own_goes_back_with_the_run(learn, tmp_path):
    def run(moment=None):
        folder = tmp_path / "moments"
        folder.mkdir(exist_ok=True)
        if moment:
            faults.plan_fault(folder, moment, "kill")
        engine = faults.build(folder, reward=CountingReward)
        return learn(engine, {"policy": {"num_gpu": 1}}, **faults.SETTINGS)

    whole = run()
    result = run("reward.forward8")
    assert account(result) == account(whole)
    (recovery,) = recoveries(result)
    assert recovery["kind"] == "roll_back"
