"""What every backend does the same way."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest

from chatlearn import BaseModule
from chatlearn.config import load_config
from chatlearn.errors import ConfigError, PlacementError, WorkerError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.contract import ModelSpec
from chatlearn.runtime.local_backend import LocalBackend
from chatlearn.runtime.placement import DeviceInventory, build_requests, plan_placement
from chatlearn.runtime.ray_backend import RayBackend
from chatlearn.runtime.threads import count_cores

TIMEOUT_S = 30.0


class Model(BaseModule):
    def __init__(self, name):
        super().__init__(name)
        self.seen = []


def add(context, left, right):
    context.module.seen.append((left, right))
    return left + right


def history(context):
    return list(context.module.seen)


def split(_context, value):
    return value // 2, value % 2


def total(_context, parts):
    return sum(parts["list"]) + parts["tuple"][0]


def fail(_context, text):
    raise ValueError(text)


def leave(_context, kind):
    raise kind("gone")


def who(context):
    return context.model_name, context.replica, context.rank, os.getpid()


def count_threads(_context):
    import torch

    return torch.get_num_threads()


def start(backend, config=None, names=("left", "right")):
    config = load_config(config or {})
    requests = build_requests(config, names, ())
    specs = [
        ModelSpec(r.model_name, Model(r.model_name), r.layout, r.num_replicas) for r in requests
    ]
    placement = plan_placement(requests, (), DeviceInventory(1, None, "logical"))
    return backend.start(specs, placement, config)


@pytest.fixture(scope="module")
def ray_backend(_ray_head, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        _ray_head.enter(patch)
        backend = RayBackend(tmp_path_factory.mktemp("logs"))
        groups = start(backend)
        yield backend, groups
        backend.close()


@pytest.fixture(params=["local", "ray"])
def running(request):
    if request.param == "ray":
        yield request.getfixturevalue("ray_backend")
        return
    backend = LocalBackend()
    yield backend, start(backend)
    backend.close()


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        *(("local", None), ("local", 3), ("ray", None)),
        pytest.param("ray", 3, marks=pytest.mark.long),
    ],
)
def test_threads_follow_from_the_placement_unless_they_are_set(
    kind, given, ray_cluster, monkeypatch, tmp_path
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    variables = {"OMP_NUM_THREADS": given} if given else {}
    backend = LocalBackend() if kind == "local" else RayBackend(tmp_path)
    if given and kind == "local":
        monkeypatch.setenv("OMP_NUM_THREADS", str(given))
        variables = {}
    try:
        groups = start(backend, {"runtime_env": {"env_vars": variables}} if variables else None)
        found = backend.fetch(groups["left"][0].call(count_threads)[0], TIMEOUT_S)
    finally:
        backend.close()
    # The two models of `ray` may work at the same time.
    assert found == (given or max(1, count_cores() // (1 if kind == "local" else 2)))


def test_groups_say_who_their_workers_are(running):
    backend, groups = running
    group = groups["right"][0]
    (call,) = group.call(who)
    worker = group.workers[0]
    assert backend.fetch(call, TIMEOUT_S) == ("right", 0, 0, worker.process_id)
    assert (group.model_name, group.replica, group.layout) == ("right", 0, ParallelLayout())
    assert call.worker == worker


def test_calls_of_one_worker_run_in_the_order_given(running):
    backend, groups = running
    group = groups["left"][0]
    before = len(backend.fetch(group.call(history)[0], TIMEOUT_S))
    calls = [group.call(add, number, 1)[0] for number in range(20)]
    results = [backend.fetch(call, TIMEOUT_S) for call in reversed(calls)]
    assert results == list(range(20, 0, -1))
    seen = backend.fetch(group.call(history)[0], TIMEOUT_S)
    assert seen[before:] == [(number, 1) for number in range(20)]


def test_outputs_pass_from_worker_to_worker_inside_containers(running):
    backend, groups = running
    (parts,) = groups["left"][0].call(split, 11, num_outputs=2)
    argument = {"list": [parts.outputs[0], backend.put(100)], "tuple": (parts.outputs[1],)}
    (call,) = groups["right"][0].call(total, argument)
    assert backend.fetch(call, TIMEOUT_S) == 5 + 100 + 1
    assert backend.get(parts.outputs[1], TIMEOUT_S) == 1
    assert backend.fetch(parts, TIMEOUT_S, output=1) == 1


def test_wait_any_gives_calls_that_are_done(running):
    backend, groups = running
    open_calls = [*groups["left"][0].call(add, 1, 2), *groups["right"][0].call(add, 3, 4)]
    results = []
    while open_calls:
        done = backend.wait_any(open_calls, TIMEOUT_S)
        assert done
        results += [backend.fetch(call, TIMEOUT_S) for call in done]
        open_calls = [call for call in open_calls if call not in done]
    assert sorted(results) == [3, 7]


@pytest.mark.parametrize("how", ["wait_any", "fetch"])
def test_an_error_carries_role_rank_flow_line_and_traceback(running, how):
    backend, groups = running
    (call,) = groups["right"][0].call(fail, "seven is odd", flow_line="flow.py:3: right.f(x)")
    ask = {"wait_any": lambda: backend.wait_any([call], TIMEOUT_S)}
    with pytest.raises(WorkerError) as caught:
        ask.get(how, lambda: backend.fetch(call, TIMEOUT_S))()
    error = caught.value
    assert (error.model_name, error.rank, error.replica) == ("right", 0, 0)
    assert error.flow_line == "flow.py:3: right.f(x)"
    assert "raise ValueError(text)" in error.worker_traceback
    assert "ValueError: seven is odd" in str(error)
    assert "model 'right', replica 0, rank 0" in str(error)


@pytest.mark.parametrize("kind", [SystemExit, asyncio.CancelledError])
def test_what_leaves_the_process_elsewhere_is_an_error_of_the_worker(running, kind):
    backend, groups = running
    group = groups["left"][0]
    with pytest.raises(WorkerError, match=f"{kind.__name__}: gone") as caught:
        backend.fetch(group.call(leave, kind, flow_line="flow.py:2: left.f(b)")[0], TIMEOUT_S)
    assert not caught.value.is_death
    assert caught.value.flow_line == "flow.py:2: left.f(b)"
    assert 'raise kind("gone")' in caught.value.worker_traceback
    assert backend.fetch(group.call(add, 2, 2)[0], TIMEOUT_S) == 4


def test_an_argument_that_failed_fails_its_consumer_with_the_first_cause(running):
    backend, groups = running
    (bad,) = groups["left"][0].call(fail, "no rows", flow_line="flow.py:1: left.f(b)")
    (call,) = groups["right"][0].call(add, bad.outputs[0], 1)
    with pytest.raises(WorkerError) as caught:
        backend.fetch(call, TIMEOUT_S)
    assert caught.value.model_name == "left"
    assert caught.value.flow_line == "flow.py:1: left.f(b)"


def test_a_worker_goes_on_after_an_error(running):
    backend, groups = running
    group = groups["left"][0]
    with pytest.raises(WorkerError):
        backend.fetch(group.call(fail, "once")[0], TIMEOUT_S)
    assert backend.fetch(group.call(add, 2, 2)[0], TIMEOUT_S) == 4


def test_a_function_that_gives_too_few_outputs_is_an_error(running):
    backend, groups = running
    (call,) = groups["left"][0].call(split, 4, num_outputs=3)
    with pytest.raises(WorkerError, match="gave 2 outputs, expected 3"):
        backend.fetch(call, TIMEOUT_S)


def test_local_refuses_a_model_of_two_ranks_by_name():
    with pytest.raises(PlacementError, match="model 'left' asks for 2 ranks"):
        start(LocalBackend(), {"models": {"left": {"num_gpu": 2}}})


def test_local_leaves_no_process_group():
    import torch.distributed as dist

    backend = LocalBackend()
    start(backend)
    assert dist.is_initialized()
    backend.close()
    backend.close()
    assert not dist.is_initialized()


def test_a_keyboard_interrupt_that_a_ray_worker_raises_itself_is_its_error(ray_backend):
    backend, groups = ray_backend
    (call,) = groups["left"][0].call(leave, KeyboardInterrupt)
    with pytest.raises(WorkerError, match="KeyboardInterrupt: gone"):
        backend.fetch(call, TIMEOUT_S)


class Locked(Model):
    def __init__(self, name):
        super().__init__(name)
        self.guard = threading.Lock()


def test_a_module_that_cannot_be_sent_is_named_before_anything_starts(tmp_path):
    spec = ModelSpec("left", Locked("left"), ParallelLayout(), 1)
    placement = plan_placement((), (), DeviceInventory(1, None, "logical"))
    message = "model 'left' cannot be sent to its workers, because of its attribute 'guard': .*lock"
    with pytest.raises(ConfigError, match=message):
        RayBackend(tmp_path).start([spec], placement, load_config({}))


def test_ray_stops_its_workers_and_only_those(ray_cluster, tmp_path):
    import psutil

    backend = RayBackend(tmp_path)
    groups = start(backend, {"models": {"left": {"num_gpu": 2}}}, names=("left",))
    workers = [worker for group in groups["left"] for worker in group.workers]
    assert len({worker.process_id for worker in workers}) == 2
    backend.close()
    _, alive = psutil.wait_procs(
        [psutil.Process(w.process_id) for w in workers if psutil.pid_exists(w.process_id)], 10
    )
    assert alive == []
    assert (tmp_path / "left.r0.0.log").exists()
