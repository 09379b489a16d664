"""Everything that is alive during one run, and its orderly end. Driver side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from chatlearn.data.balance import Limits
from chatlearn.engine.worker_calls import ModuleInfo, finish_episode, set_up_module, start_episode
from chatlearn.errors import WaitTimeoutError
from chatlearn.flow.call_loop import CallLoop
from chatlearn.flow.execute import FlowSettings
from chatlearn.flow.lanes import LanePool
from chatlearn.models.base import BaseModule
from chatlearn.runtime.contract import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import TracebackType
    from typing import Self

    from chatlearn.config import Config, RuntimeConfig
    from chatlearn.engine.planning import RunPlan
    from chatlearn.flow.execute import FlowRun
    from chatlearn.runtime.contract import Backend, WorkerGroup

__all__ = ["Session"]

KeyT = TypeVar("KeyT")


@dataclass
class Session:
    """The workers of a run and the loop that talks to them; a context manager that ends them.

    Attributes:
        num_updates: global batches that trainers have begun with since the session opened.
        on_restart: called with a group whose workers were replaced, once they are set up.
    """

    config: Config
    plan: RunPlan
    run_dir: Path
    backend: Backend
    groups: Mapping[str, tuple[WorkerGroup, ...]]
    loop: CallLoop
    pool: LanePool
    infos: Mapping[str, ModuleInfo]
    num_updates: int = 0
    on_restart: list[Callable[[WorkerGroup], None]] = field(
        default_factory=list["Callable[[WorkerGroup], None]"]
    )

    @classmethod
    def open(cls, config: Config, plan: RunPlan, run_dir: Path, backend: Backend) -> Session:
        """Start every worker and set up every module; on an error nothing is left running."""
        try:
            groups = backend.start(_build_specs(plan), plan.placement, config)
            runtime = config.runtime
            loop = CallLoop(backend, runtime.stage_timeout_s)
            pool = LanePool(groups, runtime.colocation_groups)
            session = cls(config, plan, run_dir, backend, groups, loop, pool, {})
            session.infos = session._set_up_modules()
        except WaitTimeoutError as error:
            error.explain(backend.explain(error.workers))
            backend.stop()
            raise
        except BaseException:
            backend.stop()
            raise
        return session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.backend.stop()

    def call_all(
        self, function: Callable[..., Any], *args: Any, names: tuple[str, ...] | None = None
    ) -> dict[str, list[Any]]:
        """Run `function(context, *args)` on every rank of the named models (default: all).

        Returns:
            For each model, the results by replica and rank.
        """
        chosen = names if names is not None else tuple(self.groups)
        calls = {
            name: [call for group in self.groups[name] for call in group.call(function, *args)]
            for name in chosen
        }
        return self.collect(calls, getattr(function, "__name__", "call"))

    def collect(self, calls: Mapping[KeyT, list[Any]], what: str) -> dict[KeyT, list[Any]]:
        """Wait for calls that were started, and fetch their results, by the calls' keys."""
        flat = [call for batch in calls.values() for call in batch]
        finished: list[str] = []
        if flat:
            self.loop.submit(flat, lambda: finished.append(what), what)
            self.loop.run_until(lambda: bool(finished))
        timeout_s = self.loop.stage_timeout_s
        return {
            name: [self.backend.fetch(call, timeout_s) for call in batch]
            for name, batch in calls.items()
        }

    def explain(self, error: WaitTimeoutError) -> None:
        """Let an error say what every worker does at this moment, unless it does."""
        if not error.is_explained:
            error.explain(self.backend.explain(error.workers))

    def flow_settings(self, iteration: int = 0, num_batches: int = 1) -> FlowSettings:
        """How the config wants flows to be cut into calls."""
        runtime = self.config.runtime
        return FlowSettings(
            batch_sizes={name: self._batch_size(name) for name in self.groups},
            train_limits=_train_limits(runtime),
            prompt_sharers=frozenset(n for n, info in self.infos.items() if info.shares_prompts),
            is_deterministic=runtime.deterministic,
            iteration=iteration,
            num_batches=num_batches,
        )

    def run_flow(self, run: FlowRun) -> None:
        """Let a flow run to its end."""
        self.loop.attach(run)
        try:
            self.loop.run_until(lambda: run.is_done)
        finally:
            self.loop.detach(run)

    def start_episode(self) -> None:
        """Call `before_episode` of every module that has one of its own."""
        modules = self.plan.flows.modules
        names = tuple(
            name
            for name in self.groups
            if type(modules[name]).before_episode is not BaseModule.before_episode
        )
        if names:
            self.call_all(start_episode, names=names)

    def finish_episode(self) -> dict[str, list[Mapping[str, float]]]:
        """Call every module's `after_episode`; gives the metrics they logged."""
        return self.call_all(finish_episode)

    def _batch_size(self, name: str) -> int | None:
        size = self.config.model(name).generation_batch_size
        return size if size is not None else self.config.runtime.generation_batch_size

    def _set_up_modules(self) -> dict[str, ModuleInfo]:
        runtime = self.config.runtime
        calls = {
            name: [
                call
                for group in groups
                for call in group.call(
                    set_up_module, self.config.model(name), runtime, self.run_dir
                )
            ]
            for name, groups in self.groups.items()
        }
        results = self.collect(calls, "setup")
        return {name: found[0] for name, found in results.items()}

    def set_up_again(self, group: WorkerGroup) -> None:
        """Set up the module on workers that have taken the place of others."""
        name = group.model_name
        calls = group.call(
            set_up_module, self.config.model(name), self.config.runtime, self.run_dir
        )
        self.collect({name: list(calls)}, "setup")
        if type(self.plan.flows.modules[name]).before_episode is not BaseModule.before_episode:
            self.collect({name: list(group.call(start_episode))}, "before_episode")
        for hook in self.on_restart:
            hook(group)


def _train_limits(runtime: RuntimeConfig) -> Limits:
    if runtime.train_micro_batch_tokens is not None:
        return Limits(tokens=runtime.train_micro_batch_tokens)
    return Limits(rows=runtime.train_micro_batch_size)


def _build_specs(plan: RunPlan) -> tuple[ModelSpec, ...]:
    return tuple(
        ModelSpec(
            name=request.model_name,
            module=plan.flows.modules[request.model_name],
            layout=request.layout,
            num_replicas=request.num_replicas,
            is_cpu_only=request.is_cpu_only,
        )
        for request in plan.requests
    )
