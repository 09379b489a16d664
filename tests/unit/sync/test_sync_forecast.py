"""The plan of a sync from layouts and places alone, before any worker exists."""

import pytest
from plan_cases import halves, shard, whole

from chatlearn.errors import SyncError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.placement import DeviceInventory, ModelRequest, plan_placement
from chatlearn.sync.forecast import PlannedModel, check_models, forecast_sync

TRAINER = PlannedModel("trainer", [rank.shards for rank in halves("trainer")], 1)
POLICY = PlannedModel("policy", [whole("policy").shards], 2)


def place(kind="gpu", num_nodes=1, devices=4, groups=()):
    """A trainer of two tensor-parallel ranks and a policy of two replicas."""
    requests = [
        ModelRequest("trainer", ParallelLayout(tp_size=2), 1, False, 1),
        ModelRequest("policy", ParallelLayout(), 2, False, 1),
    ]
    return plan_placement(requests, groups, DeviceInventory(num_nodes, devices, kind))


def bytes_of(placement, **options):
    found = forecast_sync(TRAINER, POLICY, placement, 1 << 20, **options).bytes_by_link
    return {link: size for link, size in found.items() if size}


def test_ranks_stand_where_the_placement_puts_them():
    assert bytes_of(place()) == {"node": 64}
    assert bytes_of(place(num_nodes=2, devices=2)) == {"network": 32, "node": 32}


def test_models_that_share_devices_copy_over_them():
    shared = place(devices=2, groups=(("trainer", "policy"),))
    assert bytes_of(shared) == {"device": 32, "node": 32}
    # Logical slots are no devices.
    logical = place("logical", devices=2, groups=(("trainer", "policy"),))
    assert bytes_of(logical) == {"node": 64}


def test_workers_are_processes_of_their_own_unless_they_share_one():
    plan = forecast_sync(TRAINER, POLICY, place(), 1 << 20)
    assert len({endpoint.process_id for endpoint in plan.endpoints}) == 4
    assert bytes_of(place("logical"), is_one_process=True) == {"process": 64}


def test_buckets_have_the_given_size():
    assert len(forecast_sync(TRAINER, POLICY, place(), 8).buckets) == 4


def test_two_models_that_do_not_fit_are_refused():
    headed = PlannedModel("trainer", [(*whole("t").shards, shard("head", (2,), (0,), (2,)))], 1)
    wide = PlannedModel("policy", [(shard("w", (4, 3), (0, 0), (4, 3)),)], 2)
    patient = PlannedModel("policy", POLICY.descriptions, 2, ("head",))
    for source, destination, told in (
        (headed, POLICY, "policy has no place for head"),
        (TRAINER, wide, r"w: trainer has the shape \(4, 2\)"),
    ):
        with pytest.raises(SyncError, match=told):
            check_models(source, destination)
    with pytest.raises(SyncError, match="policy has no place for head"):
        forecast_sync(headed, POLICY, place(), 1 << 20)
    check_models(TRAINER, POLICY)
    check_models(headed, patient)
    assert forecast_sync(headed, patient, place(), 1 << 20).unused_keys == ("head",)
