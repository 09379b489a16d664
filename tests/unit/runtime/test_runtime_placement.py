"""Placement: which worker goes to which device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.config import load_config
from chatlearn.errors import ConfigError, PlacementError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.placement import (
    DeviceInventory,
    DeviceSlot,
    ModelRequest,
    ReplicaSummary,
    build_requests,
    describe_placement,
    plan_placement,
)

AUTO = DeviceInventory(1, None, "logical")


def asks(name, num_ranks, *, world=1, cpu=False):
    return ModelRequest(name, ParallelLayout(tp_size=world), num_ranks // world, cpu, 2)


def devices(plan, name):
    return [
        (p.replica, p.rank, p.slot.node, p.slot.device) for p in plan.places if p.model_name == name
    ]


def test_models_take_devices_side_by_side():
    plan = plan_placement([asks("a", 2, world=2), asks("b", 3)], [], AUTO)
    assert devices(plan, "a") == [(0, 0, 0, 0), (0, 1, 0, 1)]
    assert devices(plan, "b") == [(0, 0, 0, 2), (1, 0, 0, 3), (2, 0, 0, 4)]
    assert plan.groups == (("a",), ("b",))
    assert (plan.num_nodes, plan.devices_per_node, plan.device_kind) == (1, 5, "logical")
    assert {p.share for p in plan.places} == {1.0}


def test_models_of_a_colocation_group_share_its_devices():
    requests = [asks("small", 1), asks("other", 1), asks("large", 4, world=2)]
    plan = plan_placement(requests, [("small", "large")], DeviceInventory(1, 8, "gpu"))
    assert plan.groups == (("small", "large"), ("other",))
    assert devices(plan, "large") == [(0, 0, 0, 0), (0, 1, 0, 1), (1, 0, 0, 2), (1, 1, 0, 3)]
    assert devices(plan, "small") == [(0, 0, 0, 0)]
    assert devices(plan, "other") == [(0, 0, 0, 4)]
    assert [p.share for p in plan.places] == [0.5, 1.0, 1.0, 1.0, 0.5, 1.0]


def test_smaller_models_of_a_group_stand_side_by_side():
    requests = [asks("large", 4), asks("one", 2), asks("two", 2)]
    plan = plan_placement(requests, [("large", "one", "two")], AUTO)
    assert [slot[3] for slot in devices(plan, "one")] == [0, 1]
    assert [slot[3] for slot in devices(plan, "two")] == [2, 3]
    assert {p.share for p in plan.places} == {0.5}


def test_a_cpu_only_model_takes_no_device_and_one_place_for_each_rank():
    requests = [asks("rule", 2, cpu=True), asks("policy", 1), asks("tree", 2, world=2, cpu=True)]
    plan = plan_placement(requests, [("policy", "rule")], DeviceInventory(1, 1, "gpu"))
    places = {name: [p for p in plan.places if p.model_name == name] for name in ("rule", "tree")}
    assert [(p.replica, p.rank) for p in places["rule"]] == [(0, 0), (1, 0)]
    assert [(p.replica, p.rank) for p in places["tree"]] == [(0, 0), (0, 1)]
    for place in places["rule"] + places["tree"]:
        assert (place.slot, place.share, place.num_cpus) == (None, 0.0, 2.0)


def test_a_group_that_fits_on_a_node_does_not_straddle_two():
    requests = [asks("a", 6), asks("b", 4), asks("c", 4)]
    plan = plan_placement(requests, [], DeviceInventory(2, 8, "gpu"))
    assert {p.slot for p in plan.places if p.model_name == "b"} == {
        DeviceSlot(1, at) for at in range(4)
    }
    assert {p.slot for p in plan.places if p.model_name == "c"} == {
        DeviceSlot(1, at) for at in range(4, 8)
    }


def test_a_group_larger_than_a_node_spreads_over_several():
    plan = plan_placement([asks("a", 6, world=6)], [], DeviceInventory(2, 4, "gpu"))
    assert [(node, device) for _, _, node, device in devices(plan, "a")] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 0),
        (1, 1),
    ]


def test_too_few_devices_shows_what_is_asked_and_what_there_is():
    requests = [
        asks("policy", 4),
        asks("value", 2),
        asks("reference", 2),
        asks("rule", 1, cpu=True),
    ]
    with pytest.raises(PlacementError) as caught:
        plan_placement(requests, [("value", "reference")], DeviceInventory(2, 2, "gpu"))
    assert str(caught.value).splitlines() == [
        "the models ask for 6 GPUs; there are 4 (2 nodes x 2):",
        "     4  policy 4",
        "     2  value 2, reference 2",
        "Lower num_gpu, or let models share devices with runtime.colocation.",
    ]


def test_devices_that_only_suffice_in_number_are_explained():
    requests = [asks("a", 2), asks("b", 2), asks("c", 2)]
    with pytest.raises(PlacementError, match="A group of up to 3 devices stays within a node"):
        plan_placement(requests, [], DeviceInventory(2, 3, "gpu"))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4))
def test_automatic_slots_always_suffice_and_hold_one_worker_each(sizes, num_nodes):
    requests = [asks(f"m{at}", size) for at, size in enumerate(sizes)]
    plan = plan_placement(requests, [], DeviceInventory(num_nodes, None, "logical"))
    slots = [p.slot for p in plan.places if p.slot is not None]
    assert len(slots) == len(set(slots)) == sum(sizes)
    assert all(s.node < num_nodes and s.device < plan.devices_per_node for s in slots)


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5))
def test_the_shares_of_a_device_add_up_to_one(sizes):
    requests = [asks(f"m{at}", size) for at, size in enumerate(sizes)]
    plan = plan_placement(requests, [[r.model_name for r in requests]], AUTO)
    assert plan.devices_per_node == max(sizes)
    for device in range(plan.devices_per_node):
        sharing = [p.share for p in plan.places if p.slot == DeviceSlot(0, device)]
        assert sum(sharing) == pytest.approx(1.0)


def test_requests_follow_the_config():
    config = load_config(
        {
            "models": {
                "policy": {"num_gpu": 4, "tensor_model_parallel_size": 2},
                "trainer": {
                    "num_gpu": 8,
                    "tensor_model_parallel_size": 2,
                    "pipeline_model_parallel_size": 2,
                },
                "rule": {"num_cpu": 4, "cpu_per_process": 2},
            }
        }
    )
    names = ("policy", "trainer", "rule", "plain")
    policy, trainer, rule, plain = build_requests(config, names, ("trainer",))
    assert (policy.num_replicas, policy.layout) == (2, ParallelLayout(tp_size=2))
    assert trainer.num_replicas == 1
    assert trainer.layout == ParallelLayout(tp_size=2, pp_size=2, dp_size=2)
    assert (rule.num_replicas, rule.is_cpu_only, rule.cpus_per_rank) == (2, True, 2)
    assert (plain.num_replicas, plain.layout, plain.is_cpu_only) == (1, ParallelLayout(), False)


def test_a_trainer_on_cpus_gets_a_place_for_each_data_parallel_rank():
    config = load_config({"models": {"trainer": {"num_cpu": 3}}})
    plan = plan_placement(build_requests(config, ("trainer",), ("trainer",)), [], AUTO)
    assert [(p.replica, p.rank) for p in plan.places] == [(0, 0), (0, 1), (0, 2)]


def test_a_count_that_fills_no_replica_is_refused():
    config = load_config({"models": {"rule": {"num_cpu": 4, "cpu_per_process": 2}}})
    broken = config.model("rule").model_copy(update={"tensor_model_parallel_size": 4})
    config = config.model_copy(update={"models": {"rule": broken}})
    with pytest.raises(ConfigError, match="models.rule: 2 ranks are no multiple of .* 4 x 1 x 1"):
        build_requests(config, ("rule",), ())


def test_the_placement_is_described_as_a_table():
    requests = [asks("large", 4, world=4), asks("small", 1), asks("rule", 1, cpu=True)]
    plan = plan_placement(requests, [("large", "small")], AUTO)
    assert describe_placement(plan) == [
        ReplicaSummary(0, "large", 0, 4, "0:0 .. 0:3 (1/2 each)"),
        ReplicaSummary(0, "small", 0, 1, "0:0 (1/2 each)"),
        ReplicaSummary(1, "rule", 0, 1, "CPU"),
    ]


@pytest.mark.parametrize(
    ("fields", "trainable", "words"),
    [
        ({"expert_model_parallel_size": 4, "num_gpu": 2}, True, "4 x 1 = 4 does not divide the 2"),
        ({"expert_model_parallel_size": 2}, False, "2 x 1 = 2 does not divide the 1 ranks"),
        ({"expert_tensor_parallel_size": 3, "num_gpu": 2}, True, "1 x 3 = 3 does not divide the 2"),
    ],
)
def test_experts_that_do_not_fit_on_a_stage_are_refused(fields, trainable, words):
    config = load_config({"models": {"m": {"num_moe_experts": 8, **fields}}})
    with pytest.raises(ConfigError, match=f"models.m: expert_model_parallel_size x .*{words}"):
        build_requests(config, ("m",), ("m",) if trainable else ())


def test_experts_are_spread_over_the_ranks_of_a_stage():
    model = {"num_moe_experts": 8, "num_gpu": 8, "tensor_model_parallel_size": 2}
    model |= {"expert_model_parallel_size": 4, "pipeline_model_parallel_size": 1}
    model |= {"expert_tensor_parallel_size": 1}
    [request] = build_requests(load_config({"models": {"m": model}}), ("m",), ("m",))
    assert (request.layout.ep_size, request.layout.dp_size) == (4, 4)
