"""The engine's share of an episode's time."""

import pytest

from chatlearn.data.rows import RowId
from chatlearn.engine.overhead import OverheadMeter
from chatlearn.flow.execute import StageRecord
from chatlearn.flow.stage import StageReport
from chatlearn.flow.trace import trace_flow
from chatlearn.models.base import BaseModule


class Model(BaseModule):
    def forward_step(self, data):
        return data

    def train_step(self, data):
        return None


POLICY, REWARD, TRAINER = (Model(name) for name in ("policy", "reward", "trainer"))
GRAPHS = [
    trace_flow(lambda b: REWARD.forward_step(POLICY.forward_step(b)), name="environment").graph,
    trace_flow(lambda b: TRAINER.train_step(b), name="trainer").graph,
]


def call(model, start_s, end_s, rows=(0,), *, lane=0, flow="environment"):
    node = {"policy": 0, "reward": 1, "trainer": 0, "prepare": None}[model]
    name = "trainer" if model == "prepare" else model
    method = {"trainer": "train_step", "prepare": "prepare_episode"}.get(model, "forward_step")
    report = StageReport(start_s, end_s, len(rows), {}, {})
    row_ids = tuple(RowId(row, 0) for row in rows)
    return StageRecord(flow, name, method, f"{name}[{lane}]", report, (True, 0), row_ids, node)


def train(start_s, end_s, rows, model="trainer", lane=0):
    return call(model, start_s, end_s, rows, lane=lane, flow="trainer")


def measure(calls, end_s, *, colocation=(), has_manager=False, syncs=()):
    meter = OverheadMeter(GRAPHS, colocation, has_manager=has_manager, now_s=0.0)
    meter.add_calls(calls)
    for start, end in syncs:
        meter.add_models(start, end, ("trainer", "policy"))
    return meter.finish(end_s)


def test_gaps_between_calls_that_wait_for_each_other_are_overhead():
    calls = [call("policy", 0, 4), call("reward", 5, 6), train(7, 9, (0,))]
    found = measure(calls, 10.0, syncs=[(9.5, 10.0)])
    assert found["time/critical_path"] == 7.5
    assert found["engine_overhead"] == pytest.approx(0.25)


def test_an_idle_lane_is_no_overhead():
    calls = [call("policy", 0, 4, lane=0), call("policy", 0, 1, (1,), lane=1)]
    assert measure([*calls, call("reward", 4, 5, (0, 1))], 5.0)["engine_overhead"] == 0.0


def test_calls_of_one_lane_follow_each_other():
    calls = [call("policy", 0, 2), call("policy", 2, 4, (1,)), call("reward", 4, 5, (1,))]
    assert measure(calls, 5.0)["engine_overhead"] == 0.0


def test_a_call_waits_only_for_its_own_rows():
    calls = [call("policy", 0, 3), call("policy", 0, 1, (1,), lane=1), call("reward", 4, 5, (1,))]
    assert measure(calls, 5.0)["time/critical_path"] == 3.0


def test_colocated_models_take_turns():
    calls = [call("policy", 0, 3), call("reward", 3, 5, (1,))]
    assert measure(calls, 5.0)["time/critical_path"] == 3.0
    colocated = measure(calls, 5.0, colocation=[("policy", "reward")])
    assert colocated["time/critical_path"] == 5.0


def test_training_waits_for_its_rows_or_for_the_whole_rollout():
    calls = [call("reward", 0, 3), call("reward", 0, 1, (1,), lane=1), train(3, 5, (1,))]
    assert measure(calls, 5.0)["time/critical_path"] == 3.0
    assert measure(calls, 5.0, has_manager=True)["time/critical_path"] == 5.0
    prepared = [*calls[:2], train(3, 4, (0, 1), "prepare"), train(4, 5, (1,))]
    assert measure(prepared, 5.0)["time/critical_path"] == 5.0


def test_each_episode_has_an_account_of_its_own():
    meter = OverheadMeter(GRAPHS, (), has_manager=False, now_s=0.0)
    meter.add_calls([call("policy", 0, 4)])
    assert meter.finish(8.0)["engine_overhead"] == 0.5
    meter.add_calls([call("policy", 8, 12)])
    assert meter.finish(12.0)["engine_overhead"] == 0.0
