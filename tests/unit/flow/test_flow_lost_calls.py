"""Calls that were lost with their worker are made again, as they were, and count once."""

import pytest
from flow_fakes import FakeBackend, FakeGroup

from chatlearn.errors import WorkerError
from chatlearn.flow.call_loop import CallLoop
from chatlearn.flow.lanes import LanePool


def death(name, replica=0):
    return WorkerError("gone", model_name=name, rank=0, replica=replica, is_death=True)


def test_what_cannot_be_made_again_leaves_everything_as_it_was(flow_parts):
    loop, group = flow_parts
    done = []
    loop.submit(group.call(lambda context: None), lambda: done.append(1), "hook")
    assert loop.take_lost("policy", 0) is None
    loop.run_until(lambda: bool(done))


def test_lost_calls_are_given_back_with_what_to_do(flow_parts):
    loop, group = flow_parts
    done, again = [], []
    for _ in range(2):
        calls = group.call(lambda context: None)
        loop.submit(calls, lambda: done.append(1), "stage", lambda: again.append(1))
    assert loop.take_lost("other", 0).again == ()
    lost = loop.take_lost("policy", 0)
    assert len(lost.again) == 2
    assert lost.seconds >= 0
    for action in lost.again:
        action()
    assert (done, again) == ([], [1, 1])


def test_a_failure_that_is_recovered_from_does_not_end_the_loop(flow_parts, monkeypatch):
    loop, group = flow_parts
    done, seen = [], []
    failures = [death("policy")]
    wait = loop.backend.wait_any

    def wait_any(calls, timeout_s):
        if failures:
            raise failures.pop()
        return wait(calls, timeout_s)

    monkeypatch.setattr(loop.backend, "wait_any", wait_any)
    loop.recover = lambda error: seen.append(error) is None
    loop.submit(group.call(lambda context: None), lambda: done.append(1), "stage")
    loop.run_until(lambda: bool(done))
    assert len(seen) == 1
    failures.append(death("policy"))
    loop.recover = lambda error: False
    loop.submit(group.call(lambda context: None), lambda: done.append(1), "stage")
    with pytest.raises(WorkerError, match="gone"):
        loop.run_until(lambda: len(done) == 2)


def test_a_group_on_hold_gives_out_no_lane(flow_parts):
    _, group = flow_parts
    pool = LanePool({"policy": [group]})
    pool.hold(group)
    assert pool.acquire("policy") is None
    pool.let_go(group)
    assert pool.acquire("policy").group is group


@pytest.fixture
def flow_parts():
    from flow_fakes import ONE, Tagger

    backend = FakeBackend()
    return CallLoop(backend, stage_timeout_s=10), FakeGroup(backend, Tagger("policy"), 0, ONE)
