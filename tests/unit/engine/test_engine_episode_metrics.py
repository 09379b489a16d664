"""From the calls of an episode to its metrics."""

import pytest

from chatlearn.engine.episode_metrics import WeightedMeans, summarize_records, wall_seconds
from chatlearn.flow.execute import StageRecord
from chatlearn.flow.stage import StageReport


def record(model, lane, start_s, end_s, *, rows=1, metrics=None, statistics=None):
    report = StageReport(start_s, end_s, rows, metrics or {}, statistics or {})
    return StageRecord("environment", model, "forward_step", lane, report)


def test_means_are_weighted_and_prefixed():
    means = WeightedMeans()
    means.add({"kl": 1.0}, 3.0, "train/policy/")
    means.add({"kl": 5.0, "loss": 2.0}, 1.0, "train/policy/")
    assert means.result() == {"train/policy/kl": 2.0, "train/policy/loss": 2.0}


def test_a_metric_without_weight_is_left_out():
    means = WeightedMeans()
    means.add({"kl": 1.0}, 0.0)
    assert means.result() == {}


def test_calls_count_by_their_rows():
    records = [
        record("policy", "policy[0]", 0, 1, rows=6, statistics={"reward": 1.0}),
        record("policy", "policy[1]", 0, 1, rows=2, statistics={"reward": 0.0}),
    ]
    assert summarize_records(records, "rollout")["rollout/reward"] == 0.75


def test_what_modules_log_carries_their_name():
    records = [
        record("a", "a[0]", 0, 1, metrics={"loss": 1.0}),
        record("b", "b[0]", 0, 1, metrics={"loss": 3.0}),
    ]
    found = summarize_records(records, "train")
    assert (found["train/a/loss"], found["train/b/loss"]) == (1.0, 3.0)


def test_a_call_without_rows_counts_as_one():
    found = summarize_records([record("a", "a[0]", 0, 1, rows=0, metrics={"loss": 2.0})], "train")
    assert found["train/a/loss"] == 2.0


def test_a_stage_takes_the_seconds_of_its_longest_lane():
    records = [
        record("policy", "policy[0]", 0.0, 2.0),
        record("policy", "policy[0]", 5.0, 6.0),
        record("policy", "policy[1]", 0.0, 2.5),
    ]
    assert summarize_records(records, "rollout") == {"time/rollout/policy.forward_step": 3.0}


def test_wall_seconds_span_all_calls():
    records = [record("a", "a[0]", 12.0, 13.0), record("b", "b[0]", 10.0, 11.5)]
    assert wall_seconds(records) == pytest.approx(3.0)
    assert wall_seconds([]) == 0.0
