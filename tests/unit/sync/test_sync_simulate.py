"""Simulated syncs on numbers worked out by hand, and plans of the largest models."""

import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plan_cases import models

from chatlearn.parallel.sharding import Box, TensorShard
from chatlearn.sync.plan import plan_sync
from chatlearn.sync.records import Endpoint
from chatlearn.sync.simulate import ClusterSpeeds, simulate_sync
from scripts.bench.plan_scale import CASES, plan_case

# `make test-long` tries many more.
EXAMPLES = int(os.environ.get("CHATLEARN_TEST_EXAMPLES", "200"))
# A copy takes 1 s for 10 bytes, a message 1 s for 4 bytes.
SPEEDS = ClusterSpeeds(process=10.0, device=10.0, node=10.0, network=4.0, latency_s=0.0)


def vector(name, length, node, *, rank=0, replica=0):
    shard = TensorShard("w", (length,), Box((0,), (length,)), "float32", "w", (0,))
    return Endpoint(name, replica, rank, node, hash((name, replica, rank)), (shard,))


def test_a_copy_takes_its_bytes_over_the_speed():
    plan = plan_sync([vector("a", 5, "n")], [vector("b", 5, "n")])
    found = simulate_sync(plan, SPEEDS)
    assert (found.seconds, found.lower_bound_s, found.network_s) == (2.0, 2.0, 0.0)


def test_buckets_follow_each_other_along_a_chain():
    # Four buckets of 1 s each to three nodes: the last one arrives after 4 + 2 seconds.
    takers = [vector("b", 4, f"m{replica}", replica=replica) for replica in range(3)]
    plan = plan_sync([vector("a", 4, "n")], takers, bucket_bytes=4)
    found = simulate_sync(plan, SPEEDS)
    assert (found.seconds, found.lower_bound_s) == (6.0, 4.0)


def test_two_holders_halve_what_must_be_sent():
    holders = [vector("a", 8, f"n{rank}", rank=rank) for rank in range(2)]
    takers = [vector("b", 8, "m", replica=replica) for replica in range(2)]
    found = simulate_sync(plan_sync(holders, takers, bucket_bytes=4), SPEEDS)
    # 32 bytes over the network of the node's two ranks, then 16 bytes that each takes from the
    # other.
    assert found.lower_bound_s == 32 / (2 * 4.0)
    assert found.seconds >= found.lower_bound_s


def test_the_bound_does_not_follow_the_plans_choice_of_who_receives():
    # With one bucket one rank receives all and the other copies all, with many they share that.
    slow = ClusterSpeeds(10.0, 10.0, 2.0, 4.0, latency_s=0.0)
    sides = [vector("a", 64, "n")], [vector("b", 64, "m", replica=replica) for replica in (0, 1)]
    whole, cut = (
        simulate_sync(plan_sync(*sides, bucket_bytes=size), slow) for size in (1 << 20, 4)
    )
    # Of 512 bytes that the two want half is copied, at 2 bytes per second by each of them.
    assert whole.lower_bound_s == cut.lower_bound_s == 256 / (2 * 2.0)
    assert cut.lower_bound_s <= cut.seconds < whole.seconds


@settings(max_examples=EXAMPLES // 2, deadline=None)
@given(models(), st.tuples(*[st.sampled_from([1.0, 3.0, 10.0])] * 4))
def test_no_plan_of_the_same_layouts_beats_the_bound(sides, rates):
    speeds = ClusterSpeeds(*rates, latency_s=0.0)
    found = [simulate_sync(plan_sync(*sides, size), speeds) for size in (4, 12, 1 << 20)]
    bounds = [each.lower_bound_s for each in found]
    assert bounds == pytest.approx([bounds[0]] * 3)
    assert min(each.seconds for each in found) >= bounds[0] * (1 - 1e-9)


def test_latency_counts_for_each_message():
    speeds = ClusterSpeeds(10.0, 10.0, 10.0, 4.0, latency_s=0.5)
    plan = plan_sync([vector("a", 4, "n")], [vector("b", 4, "m")], bucket_bytes=8)
    assert simulate_sync(plan, speeds).seconds == pytest.approx(2 * (2.0 + 0.5))


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_the_largest_models_are_planned_in_time_and_near_the_bound(case):
    start = time.process_time()
    found = plan_case(case)
    assert time.process_time() - start < 2 * case.bar_s
    assert found["describe_s"] + found["plan_s"] < case.bar_s
    assert found["peak_gb"] < 4
    assert found["simulated_s"] < 1.1 * found["lower_bound_s"]
