# pyright: standard, reportPrivateImportUsage=false
"""The Ray backend: one actor per rank, in one placement group per colocation group."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.errors import PlacementError, WaitTimeoutError
from chatlearn.runtime import ray_cluster
from chatlearn.runtime.contract import (
    ModelSpec,
    PendingCall,
    RemoteValue,
    WorkerGroup,
    WorkerSummary,
)
from chatlearn.runtime.explain import explain_workers
from chatlearn.runtime.heartbeats import Heartbeats, kill_workers
from chatlearn.runtime.module_packing import pack_module
from chatlearn.runtime.ray_errors import describe_failure
from chatlearn.runtime.ray_placement import ActorSlot, create_groups
from chatlearn.runtime.ray_watches import DeathWatches
from chatlearn.runtime.ray_worker import RayWorker, WorkerSettings
from chatlearn.runtime.threads import ThreadShare, given_threads, plan_thread_shares

if TYPE_CHECKING:
    from chatlearn.config import Config
    from chatlearn.parallel.layout import ParallelLayout
    from chatlearn.runtime.placement import PlacementPlan, WorkerPlace

__all__ = ["RayBackend"]

_SHUTDOWN_S = 3.0


@dataclass(frozen=True)
class _Actor:
    """One worker on the driver's side."""

    handle: Any
    place: WorkerPlace


class _RayGroup:
    """The actors of one replica."""

    def __init__(
        self,
        model_name: str,
        replica: int,
        layout: ParallelLayout,
        actors: Sequence[Any],
        workers: tuple[WorkerSummary, ...],
    ) -> None:
        self.model_name = model_name
        self.replica = replica
        self.layout = layout
        self.workers = workers
        self.actors = tuple(actors)

    def replace(self, actors: Sequence[Any], workers: tuple[WorkerSummary, ...]) -> None:
        """Go on with other actors, which have taken the place of those before."""
        self.actors, self.workers = tuple(actors), workers

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: Sequence[int] | None = None,
        num_outputs: int = 1,
        flow_line: str = "",
    ) -> tuple[PendingCall, ...]:
        """Start the function on the given ranks."""
        import ray

        chosen = tuple(ranks if ranks is not None else range(len(self.actors)))
        # Several ranks share one copy in the object store; for one alone that is a detour.
        packed = ray.put((function, args)) if len(chosen) > 1 else (function, args)
        calls: list[PendingCall] = []
        for rank in chosen:
            method = self.actors[rank].run.options(num_returns=num_outputs)
            found = method.remote(packed, num_outputs, flow_line)
            refs = (found,) if num_outputs == 1 else tuple(found)
            outputs = tuple(RemoteValue(ref) for ref in refs)
            calls.append(PendingCall(self.workers[rank], outputs, flow_line))
        return tuple(calls)


@dataclass(frozen=True)
class _Launch:
    """What the workers were started from, to start some of them again."""

    specs: Mapping[str, ModelSpec]
    modules: Mapping[str, bytes]
    slots: Mapping[WorkerPlace, ActorSlot]
    shares: Mapping[WorkerPlace, ThreadShare]
    config: Config


class RayBackend:
    """Fulfils `chatlearn.runtime.contract.Backend` on a Ray cluster.

    Args:
        log_dir: folder of the workers' log files.
    """

    def __init__(self, log_dir: Path) -> None:
        self._log_dir = log_dir
        self._actors: list[_Actor] = []
        self._placement_groups: list[Any] = []
        self._watches = DeathWatches()
        self._summaries: dict[_Actor, WorkerSummary] = {}
        self._groups: dict[tuple[str, int], _RayGroup] = {}
        self._launch: _Launch | None = None
        self._heartbeats: Heartbeats | None = None
        self._is_connected = False

    def start(
        self, specs: Sequence[ModelSpec], placement: PlacementPlan, config: Config
    ) -> Mapping[str, tuple[WorkerGroup, ...]]:
        """Start the cluster if there is none, then every worker, then every process world.

        Raises:
            ConfigError: a module cannot be pickled; nothing was started.
            PlacementError: the cluster cannot place the workers in time.
            WorkerError: a worker failed while it started.
        """
        modules = {spec.name: pack_module(spec.name, spec.module) for spec in specs}
        if not self._is_connected:
            self._is_connected = True
            if os.environ.get("RAY_ADDRESS"):
                ray_cluster.join_cluster(config)
            else:
                ray_cluster.start_cluster(config)
        timeout_s = config.runtime.startup_timeout_s
        slots = create_groups(placement, self._placement_groups, timeout_s)
        shares = plan_thread_shares(
            placement, given_threads(config.runtime_env.env_vars, os.environ)
        )
        by_name = {spec.name: spec for spec in specs}
        self._launch = launch = _Launch(by_name, modules, slots, shares, config)
        self._heartbeats = Heartbeats(config.runtime.heartbeat_timeout_s)
        for place in placement.places:
            self._actors.append(self._create(launch, place))
        self._connect(launch, self._actors)
        for spec in specs:
            for replica in range(spec.num_replicas):
                group = _build_group(spec, replica, self._actors, self._summaries)
                self._groups[spec.name, replica] = group
        return {
            spec.name: tuple(self._groups[spec.name, at] for at in range(spec.num_replicas))
            for spec in specs
        }

    def check(self) -> None:
        """Raise the error of a worker that has died."""
        self._watches.raise_failures(self._watches.ready(), {}, self._watches.refs)

    def restart(self, model_name: str, replica: int) -> None:
        """End what is left of a replica, and start its ranks anew in the same places."""
        launch = self._launch
        if launch is None:
            raise PlacementError("nothing was started that could be started again")
        key = (model_name, replica)
        old = [a for a in self._actors if (a.place.model_name, a.place.replica) == key]
        self._end(old)
        new = [self._create(launch, actor.place) for actor in old]
        self._actors = [actor for actor in self._actors if actor not in old] + new
        self._connect(launch, new)
        group = _build_group(launch.specs[model_name], replica, new, self._summaries)
        self._groups[key].replace(group.actors, group.workers)

    def explain(self, workers: Sequence[WorkerSummary]) -> str:
        """What every worker of the run does now: stack, stage and last collective.

        Args:
            workers: those that are waited for; they come first and go into the text. All of them
                are written to a file beside the workers' logs.
        """
        return explain_workers(self._summaries.items(), workers, self._heartbeats, self._log_dir)

    def put(self, value: Any) -> RemoteValue:
        """Store a value in Ray's object store."""
        import ray

        return RemoteValue(ray.put(value))

    def get(self, value: RemoteValue, timeout_s: float) -> Any:
        """Bring a value to the driver."""
        import ray.exceptions

        try:
            return ray.get(value.handle, timeout=timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise WaitTimeoutError(f"a value did not come within {timeout_s:g} s") from error
        except ray.exceptions.RayError as error:
            raise describe_failure(error, None, "") from error

    def wait_any(self, calls: Sequence[PendingCall], timeout_s: float) -> tuple[PendingCall, ...]:
        """Block until a call is done or any worker of the run has died."""
        import ray

        refs = {call.outputs[-1].handle: call for call in calls}
        waited = [*refs, *self._watches.refs]
        ready, _ = ray.wait(waited, num_returns=1, timeout=timeout_s, fetch_local=False)
        if not ready:
            names = sorted({_label(call.worker) for call in calls})
            raise WaitTimeoutError(
                f"nothing came back within {timeout_s:g} s; awaited: {', '.join(names[:8])}"
            )
        ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0, fetch_local=False)
        self._watches.raise_failures(ready, refs, waited)
        return tuple(refs[ref] for ref in ready)

    def fetch(self, call: PendingCall, timeout_s: float, output: int = 0) -> Any:
        """The value of one output of a call."""
        import ray.exceptions

        deadline = time.monotonic() + timeout_s
        ref = call.outputs[output].handle
        while True:
            left = deadline - time.monotonic()
            ready, _ = ray.wait([ref], timeout=max(0.0, min(left, 2.0)))
            if ready:
                break
            if left <= 0:
                text = f"{_label(call.worker)} did not answer in {timeout_s:g} s"
                raise WaitTimeoutError(text, (call.worker,))
            self._watches.raise_failures(self._watches.ready(), {}, self._watches.refs)
        try:
            return ray.get(ref)
        except ray.exceptions.RayError as error:
            raise self._watches.cause_of(error, call) from error

    def stop(self) -> None:
        """Let idle workers end by themselves, and kill the rest."""
        import ray

        if self._heartbeats is not None:
            self._heartbeats.close()
            self._heartbeats = None
        if self._is_connected and ray.is_initialized():
            self._stop_actors()
            for group in self._placement_groups:
                ray.util.remove_placement_group(group)
        self._placement_groups.clear()
        self._groups.clear()

    def close(self) -> None:
        """Stop the workers, and leave the cluster."""
        if not self._is_connected:
            return
        self.stop()
        self._is_connected = False
        ray_cluster.leave_cluster()

    def _stop_actors(self) -> None:
        import ray

        refs = {actor.handle.shut_down.remote(): actor for actor in self._actors}
        late: list[Any] = []
        if refs:
            _, late = ray.wait(list(refs), num_returns=len(refs), timeout=_SHUTDOWN_S)
        for actor in self._actors:
            ray.kill(actor.handle)
        # One that was stopped does not hear Ray.
        kill_workers([self._summaries[refs[ref]] for ref in late if refs[ref] in self._summaries])
        self._actors.clear()
        self._watches.clear()
        self._summaries.clear()

    def _end(self, actors: Sequence[_Actor]) -> None:
        """Kill these workers and forget them."""
        import ray

        gone = {self._summaries.pop(actor) for actor in actors if actor in self._summaries}
        self._watches.forget(gone)
        for actor in actors:
            ray.kill(actor.handle)
        for summary in gone:
            if self._heartbeats is not None:
                self._heartbeats.remove(summary)
        kill_workers(gone)

    def _create(self, launch: _Launch, place: WorkerPlace) -> _Actor:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        slot = launch.slots[place]
        name = f"{place.model_name}.r{place.replica}.{place.rank}"
        settings = WorkerSettings(
            launch.shares[place],
            tuple(sys.path),
            str(self._log_dir.resolve() / f"{name}.log"),
            ray_cluster.find_worker_secrets(launch.config.runtime_env),
        )
        strategy = PlacementGroupSchedulingStrategy(slot.group, slot.bundle)
        # Groups of their own let a busy worker still be watched and asked for its stack.
        remote: Any = ray.remote
        kind = remote(concurrency_groups={"watch": 1, "control": 1})(RayWorker)
        actor = kind.options(
            num_cpus=slot.num_cpus,
            num_gpus=slot.num_gpus,
            scheduling_strategy=strategy,
            max_restarts=0,
        )
        return _Actor(actor.remote(settings), place)

    def _connect(self, launch: _Launch, actors: Sequence[_Actor]) -> None:
        """Let each replica's workers join their process world, and watch them."""
        config = launch.config
        timeout_s = config.runtime.startup_timeout_s
        nodes = self._await(
            {actor: actor.handle.node.remote() for actor in actors}, timeout_s, "start"
        )
        ids = {place.node_id for place in nodes.values()}
        ids |= {summary.node_id for summary in self._summaries.values()}
        is_single_node = len(ids) == 1
        summaries = {
            actor: WorkerSummary(
                actor.place.model_name,
                actor.place.replica,
                actor.place.rank,
                place.node_id,
                "127.0.0.1" if is_single_node else place.host,
                place.process_id,
            )
            for actor, place in nodes.items()
        }
        for actor, summary in summaries.items():
            watch = actor.handle.watch.options(concurrency_group="watch")
            self._watches.add(watch.remote(), summary)
        self._summaries.update(summaries)
        if self._heartbeats is not None:
            self._heartbeats.add({who: actor.handle for actor, who in summaries.items()})
        first = [actor for actor in actors if actor.place.rank == 0]
        ports = self._await(
            {
                actor: actor.handle.host_store.remote(summaries[actor].host, timeout_s)
                for actor in first
            },
            timeout_s,
            "open the store of their process world",
        )
        address = {
            (actor.place.model_name, actor.place.replica): (summaries[actor].host, port)
            for actor, port in ports.items()
        }
        reserved = ray_cluster.object_store_bytes()
        joins: dict[_Actor, Any] = {}
        for actor, summary in summaries.items():
            spec = launch.specs[summary.model_name]
            fields = {
                "model_name": summary.model_name,
                "replica": summary.replica,
                "rank": summary.rank,
                "host": summary.host,
                "node_id": summary.node_id,
                "is_cpu_only": spec.is_cpu_only,
                "timeout_s": config.runtime.sync_timeout_s,
                "reserved_shm_bytes": reserved.get(summary.node_id, 0),
            }
            where = address[summary.model_name, summary.replica]
            module = launch.modules[spec.name]
            joins[actor] = actor.handle.join.remote(fields, spec.layout, module, where)
        self._await(joins, timeout_s, "join their process world")

    def _await(self, refs: Mapping[_Actor, Any], timeout_s: float, what: str) -> dict[_Actor, Any]:
        """Results of one start-up step of every worker."""
        import ray.exceptions

        ready, late = ray.wait(list(refs.values()), num_returns=len(refs), timeout=timeout_s)
        del ready
        if late:
            names = [
                f"{actor.place.model_name}.r{actor.place.replica}.{actor.place.rank}"
                for actor, ref in refs.items()
                if ref in late
            ]
            known = [
                self._summaries[a] for a, r in refs.items() if r in late if a in self._summaries
            ]
            state = f"\n{self.explain(known)}" if known else ""
            raise PlacementError(
                f"workers did not {what} within runtime.startup_timeout_s={timeout_s:g}: "
                f"{', '.join(names[:8])}{state}"
            )
        results: dict[_Actor, Any] = {}
        for actor, ref in refs.items():
            try:
                results[actor] = ray.get(ref)
            except ray.exceptions.RayError as error:
                place = actor.place
                summary = WorkerSummary(place.model_name, place.replica, place.rank, "", "", 0)
                raise describe_failure(error, summary, "") from error
        return results


def _build_group(
    spec: ModelSpec,
    replica: int,
    actors: Sequence[_Actor],
    summaries: Mapping[_Actor, WorkerSummary],
) -> _RayGroup:
    key = (spec.name, replica)
    own = [actor for actor in actors if (actor.place.model_name, actor.place.replica) == key]
    own.sort(key=lambda actor: actor.place.rank)
    workers = tuple(summaries[actor] for actor in own)
    return _RayGroup(spec.name, replica, spec.layout, [a.handle for a in own], workers)


def _label(worker: WorkerSummary) -> str:
    return f"{worker.model_name}.r{worker.replica}.{worker.rank}"
