"""The in-process backend: every model in the driver process, one rank each, calls run at once.

For a debugger, a notebook and a single GPU. An exception of the user's code keeps its frames:
the WorkerError is raised from it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chatlearn.errors import PlacementError, WorkerError
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.contract import (
    ModelSpec,
    PendingCall,
    RemoteValue,
    WorkerGroup,
    WorkerSummary,
)
from chatlearn.runtime.placement import check_local_sizes
from chatlearn.runtime.process_world import WorkerIdentity, close_world, join_world
from chatlearn.runtime.remote_values import resolve_arguments
from chatlearn.runtime.threads import ThreadShare, count_cores, given_threads

if TYPE_CHECKING:
    from chatlearn.config import Config
    from chatlearn.parallel.context import WorkerContext
    from chatlearn.runtime.placement import PlacementPlan

__all__ = ["LocalBackend"]


class _Failure:
    """What a call left instead of a value."""

    def __init__(self, error: WorkerError) -> None:
        self.error = error


class _LocalGroup:
    """The one worker of a model."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self.model_name = context.model_name
        self.replica = 0
        self.layout = context.layout
        self.workers = (
            WorkerSummary(
                context.model_name, 0, 0, context.node_id, context.host, context.process_id
            ),
        )

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: Sequence[int] | None = None,
        num_outputs: int = 1,
        flow_line: str = "",
    ) -> tuple[PendingCall, ...]:
        """Run the function now; its result or error waits in the call."""
        if ranks is not None and tuple(ranks) != (0,):
            raise ValueError(f"the local backend has rank 0 only, got {tuple(ranks)}")
        try:
            resolved = resolve_arguments(args, _fetch_handles)
            result = function(self._context, *resolved)
            values = [result] if num_outputs == 1 else list(result)
            if len(values) != num_outputs:
                raise ValueError(f"{function} gave {len(values)} outputs, expected {num_outputs}")
        except KeyboardInterrupt:
            # Here it is the person at the keyboard, as far as one can tell.
            raise
        except BaseException as error:  # noqa: BLE001 - whatever user code raises
            failure = _Failure(self._describe(error, flow_line))
            values = [failure] * num_outputs
        outputs = tuple(RemoteValue(value) for value in values)
        return (PendingCall(self.workers[0], outputs, flow_line),)

    def close(self) -> None:
        """Close what the worker kept."""
        self._context.close()

    def _describe(self, error: BaseException, flow_line: str) -> WorkerError:
        if isinstance(error, WorkerError):
            return error
        found = WorkerError(
            f"{type(error).__name__}: {error}",
            model_name=self.model_name,
            rank=0,
            node=self._context.host,
            flow_line=flow_line,
            worker_traceback="".join(traceback.format_exception(error)),
        )
        found.__cause__ = error
        return found


class LocalBackend:
    """Fulfils `chatlearn.runtime.contract.Backend` within the driver process."""

    def __init__(self) -> None:
        self._groups: list[_LocalGroup] = []
        self._owns_world = False
        self._threads_before: int | None = None

    def start(
        self, specs: Sequence[ModelSpec], placement: PlacementPlan, config: Config
    ) -> Mapping[str, tuple[WorkerGroup, ...]]:
        """Make one context per model.

        Raises:
            PlacementError: a model asks for more than one rank; names it.
        """
        import torch
        import torch.distributed as dist

        check_local_sizes({s.name: s.num_replicas * s.layout.world_size for s in specs})
        self._owns_world = not dist.is_initialized()
        # One model works at a time, so each may use all cores.
        self._threads_before = torch.get_num_threads()
        given = given_threads(config.runtime_env.env_vars, os.environ)
        torch.set_num_threads(ThreadShare(given=given).count_threads(count_cores()))
        groups: dict[str, tuple[WorkerGroup, ...]] = {}
        for spec in specs:
            identity = WorkerIdentity(
                spec.name,
                0,
                0,
                ParallelLayout(vpp_size=spec.layout.vpp_size),
                "127.0.0.1",
                "local",
                spec.is_cpu_only,
                config.runtime.sync_timeout_s,
            )
            group = _LocalGroup(join_world(identity, spec.module, dist.HashStore()))
            self._groups.append(group)
            groups[spec.name] = (group,)
        return groups

    def put(self, value: Any) -> RemoteValue:
        """The value itself."""
        return RemoteValue(value)

    def get(self, value: RemoteValue, timeout_s: float) -> Any:
        """The value; raises the error of the call that should have made it."""
        del timeout_s
        return _value_of(value.handle)

    def wait_any(self, calls: Sequence[PendingCall], timeout_s: float) -> tuple[PendingCall, ...]:
        """All of them: calls are done when they return."""
        del timeout_s
        for call in calls:
            _value_of(call.outputs[-1].handle)
        return tuple(calls)

    def fetch(self, call: PendingCall, timeout_s: float, output: int = 0) -> Any:
        """The value of one output of a call."""
        return self.get(call.outputs[output], timeout_s)

    def check(self) -> None:
        """Nothing: no worker can die alone."""

    def restart(self, model_name: str, replica: int) -> None:
        """There is no process that could die alone."""
        raise PlacementError(f"{model_name}.r{replica} lives in the driver process")

    def explain(self, workers: Sequence[WorkerSummary]) -> str:
        """Nothing: a call has ended when it returns."""
        del workers
        return ""

    def stop(self) -> None:
        """As `close`."""
        self.close()

    def close(self) -> None:
        """Close every worker's resources, and the process world if this backend made it."""
        for group in reversed(self._groups):
            group.close()
        self._groups.clear()
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)
            self._threads_before = None
        if self._owns_world:
            self._owns_world = False
            close_world()


def _fetch_handles(handles: list[Any]) -> list[Any]:
    return [_value_of(handle) for handle in handles]


def _value_of(handle: Any) -> Any:
    if isinstance(handle, _Failure):
        raise handle.error
    return handle
