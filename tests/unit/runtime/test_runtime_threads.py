"""Thread counts from placements."""

import pytest

from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.placement import DeviceInventory, ModelRequest, plan_placement
from chatlearn.runtime.threads import ThreadShare, count_cores, given_threads, plan_thread_shares


def request(name, ranks, cpus=0):
    return ModelRequest(name, ParallelLayout(dp_size=ranks), 1, cpus > 0, max(cpus, 1))


def threads(requests, colocation=(), nodes=1, per_node=None, cores=16, given=None):
    plan = plan_placement(requests, colocation, DeviceInventory(nodes, per_node, "logical"))
    shares = plan_thread_shares(plan, given)
    return {(p.model_name, p.rank): share.count_threads(cores) for p, share in shares.items()}


def test_models_that_may_work_at_the_same_time_share_the_cores():
    found = threads([request("policy", 2), request("trainer", 2)])
    assert set(found.values()) == {4}


def test_colocated_models_take_turns_and_share_one_budget():
    found = threads(
        [request("policy", 4), request("reference", 2), request("trainer", 4)],
        [("policy", "reference", "trainer")],
    )
    assert set(found.values()) == {4}


def test_groups_beside_each_other_add_up():
    requests = [request("a", 4), request("b", 4), request("c", 2), request("d", 1)]
    assert set(threads(requests, [("a", "b"), ("c", "d")]).values()) == {16 // 6}


def test_each_node_counts_its_own_ranks():
    found = threads([request("a", 2), request("b", 1)], nodes=2, per_node=2)
    assert found == {("a", 0): 8, ("a", 1): 8, ("b", 0): 16}


def test_a_cpu_only_model_has_the_cores_that_it_asked_for():
    found = threads([request("policy", 3), request("verifier", 1, cpus=2)])
    assert found[("verifier", 0)] == 2
    assert found[("policy", 0)] == 4
    assert threads([request("verifier", 1, cpus=9)], cores=4) == {("verifier", 0): 4}


def test_cores_that_a_cpu_only_model_asked_for_are_shared_with_no_other():
    found = threads([request("policy", 2), request("reward", 1, cpus=12)])
    assert found == {("policy", 0): 2, ("policy", 1): 2, ("reward", 0): 12}
    found = threads([request("policy", 2), request("reward", 3, cpus=4)])
    assert found[("policy", 0)] == 2
    assert threads([request("policy", 2), request("reward", 1, cpus=16)])[("policy", 0)] == 1


def test_a_cpu_only_model_that_takes_turns_with_a_group_needs_no_cores_beside_it():
    requests = [request("policy", 4), request("reward", 1, cpus=8), request("trainer", 2)]
    found = threads(requests, [("policy", "reward")])
    assert found[("policy", 0)] == found[("trainer", 0)] == 2
    assert threads(requests[:2], [("policy", "reward")])[("policy", 0)] == 4


def test_there_is_at_least_one_thread():
    assert set(threads([request("a", 9)], cores=2).values()) == {1}


def test_what_the_user_set_wins():
    assert threads([request("a", 9)], cores=2, given=3)[("a", 0)] == 3


@pytest.mark.parametrize(
    ("environments", "expected"),
    [
        ([{}, {}], None),
        ([{}, {"OMP_NUM_THREADS": "4"}], 4),
        ([{"OMP_NUM_THREADS": "2,1"}, {"OMP_NUM_THREADS": "4"}], 2),
        ([{"OMP_NUM_THREADS": ""}], None),
    ],
)
def test_the_users_threads_are_those_of_the_workers_environment_first(environments, expected):
    assert given_threads(*environments) == expected


@pytest.mark.parametrize(
    ("text", "is_limited"), [("100000 100000\n", True), ("max 100000\n", False), ("?", False)]
)
def test_the_limit_of_a_container_counts(tmp_path, text, is_limited):
    quota = tmp_path / "cpu.max"
    quota.write_text(text)
    unlimited = count_cores(tmp_path / "missing")
    assert count_cores(quota) == (1 if is_limited else unlimited)
    assert ThreadShare().count_threads(unlimited) == unlimited
