"""From the calls of an episode to its metrics."""

import itertools

import pytest

from chatlearn.engine.episode_metrics import (
    WeightedMeans,
    average_workers,
    summarize_records,
    wall_seconds,
)
from chatlearn.flow.execute import StageRecord
from chatlearn.flow.stage import StageReport


def record(model, lane, start_s, end_s, *, rows=1, position=(True, 0), **shown):
    metrics, statistics = shown.get("metrics", {}), shown.get("statistics", {})
    report = StageReport(start_s, end_s, rows, metrics, statistics)
    return StageRecord("environment", model, "forward_step", lane, report, position)


def test_means_are_weighted_and_prefixed():
    means = WeightedMeans()
    means.add({"kl": 1.0}, 3.0, "train/policy/")
    means.add({"kl": 5.0, "loss": 2.0}, 1.0, "train/policy/")
    assert means.result() == {"train/policy/kl": 2.0, "train/policy/loss": 2.0}


def test_values_without_weight_count_only_where_there_are_no_others():
    means = WeightedMeans()
    means.add({"kl": 1.0, "gap": float("nan")}, 0.0)
    means.add({"kl": 2.0}, 0.0)
    means.add({"gap": 3.0}, 0.5)
    assert means.result() == {"kl": 1.5, "gap": 3.0}


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


def test_a_lane_without_rows_does_not_count():
    records = [
        record("a", "a[0]", 0, 1, rows=1, metrics={"mean": 10.0}),
        record("a", "a[1]", 0, 1, rows=0, metrics={"mean": 0.0}),
    ]
    assert summarize_records(records, "train")["train/a/mean"] == 10.0
    assert summarize_records(records[1:], "train")["train/a/mean"] == 0.0


def test_a_row_statistic_is_that_of_the_last_call_on_the_way_to_a_returned_value():
    records = [
        record("reward", "r[0]", 0, 1, rows=2, statistics={"reward": 1.0}, position=(True, 1)),
        record("shaper", "s[0]", 0, 1, rows=1, statistics={"reward": 5.0}, position=(True, 2)),
        record("shaper", "s[0]", 1, 2, rows=3, statistics={"reward": 9.0}, position=(True, 2)),
        record("judge", "j[0]", 0, 1, rows=9, statistics={"reward": 7.0}, position=(False, 3)),
    ]
    assert summarize_records(records, "rollout")["rollout/reward"] == 8.0
    assert summarize_records(records[-1:], "rollout")["rollout/reward"] == 7.0


def test_workers_count_alike_where_they_logged_a_name():
    found = {"policy": [{"seconds": 1.0}, {"seconds": 2.0, "hits": 4.0}, {}], "value": [{}]}
    assert average_workers(found, "episode") == {
        "episode/policy/seconds": 1.5,
        "episode/policy/hits": 4.0,
    }


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


def test_the_rounding_does_not_depend_on_who_answers_first():
    values = [0.1, 0.2, 0.3, 1e16, -1e16, 0.7]
    results = set()
    for order in itertools.permutations(values):
        means = WeightedMeans()
        for value in order:
            means.add({"x": value}, 3.0)
        results.add(means.result()["x"])
    assert len(results) == 1
