"""A replica that was started anew gets its weights back, from one that has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sync_cases as cases

from chatlearn.engine.syncs import WeightSource, WeightSyncs
from chatlearn.errors import SyncError, WorkerError

PAIR = ("trainer", "sampler")


@pytest.fixture(scope="module")
def workers(_ray_head, tmp_path_factory):
    with cases.pair_on_ray(
        _ray_head, tmp_path_factory.mktemp("workers"), num_sources=1, num_destinations=3
    ) as pair:
        yield pair


@pytest.fixture
def pair(workers):
    for name in workers.groups:
        workers.call(name, cases.blank)
    return workers


@pytest.fixture
def session(pair):
    """As much of a run as its syncs look at; its trainer moves on with `num_updates`."""
    module = SimpleNamespace(weight_naming="", left_out_weights=())
    flows = SimpleNamespace(syncs=(PAIR,), modules=dict.fromkeys(PAIR, module))
    return SimpleNamespace(
        plan=SimpleNamespace(flows=flows),
        groups=pair.groups,
        backend=pair.backend,
        config=pair.config,
        num_updates=0,
        loop=SimpleNamespace(needs=lambda _name: True),
    )


@pytest.fixture
def syncs(pair, session):
    """All samplers have version 0, and the trainer has moved on."""
    found = WeightSyncs(session)
    pair.call("trainer", cases.write, 0)
    found.synchronize(None)
    session.num_updates += 1
    pair.call("trainer", cases.write, 1)
    return found


def test_a_replica_gets_from_another_what_it_had(pair, syncs):
    samplers = pair.groups["sampler"]
    pair.call_one("sampler", 1, cases.blank)
    source = syncs.find_source(samplers[1])
    assert source == WeightSource(PAIR, [samplers[0]])
    syncs.refresh(samplers[1], source)
    assert not any(pair.differing(0))
    assert not any(found for name in pair.groups for found in pair.call(name, cases.kept))
    syncs.synchronize(0)
    assert not any(pair.differing(1))


def test_a_replica_that_waits_for_a_sync_gives_nothing(pair, syncs):
    samplers = pair.groups["sampler"]
    syncs.refresh(samplers[0], WeightSource(PAIR, ()))
    assert syncs.find_source(samplers[1]).groups == [samplers[2]]
    syncs.refresh(samplers[2], WeightSource(PAIR, ()))
    assert syncs.find_source(samplers[1]) is None
    with pytest.raises(WorkerError, match=r"sampler.r0.0 was asked .* started anew"):
        syncs.refresh(samplers[1], WeightSource(PAIR, samplers[:1]))
    syncs.synchronize(0)
    assert not any(pair.differing(1))
    assert syncs.find_source(samplers[1]).groups == pair.groups["trainer"]


def test_a_replica_of_another_version_gives_nothing(pair, syncs):
    samplers = pair.groups["sampler"]
    pair.call_one("sampler", 0, cases.set_version, 5)
    with pytest.raises(SyncError, match=r"should have version 0 .*but sampler.r0.0 has 5"):
        syncs.refresh(samplers[1], syncs.find_source(samplers[1]))
    syncs.synchronize(0)
    source = syncs.find_source(samplers[1])
    syncs.refresh(samplers[1], source)
    assert not any(pair.differing(1))
