# pyright: standard, reportPrivateImportUsage=false
"""The Ray actor of one rank. It imports torch only after its environment is set."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.errors import WorkerError
from chatlearn.runtime.collective_log import CollectiveLog, install
from chatlearn.runtime.heartbeats import Beat
from chatlearn.runtime.ray_errors import is_broken_connection
from chatlearn.runtime.threads import ThreadShare, count_cores

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatlearn.parallel.context import WorkerContext
    from chatlearn.parallel.layout import ParallelLayout

__all__ = ["ProcessPlace", "RayWorker", "WorkerSettings"]


@dataclass(frozen=True)
class WorkerSettings:
    """What an actor is told when it is made.

    Attributes:
        threads: the worker's part of its node's cores.
        import_path: the driver's `sys.path`, so that user modules are found.
        log_path: file that gets the worker's standard output and error.
        secrets: environment variables that Ray must not see, or it would write them to its logs.
    """

    threads: ThreadShare
    import_path: tuple[str, ...]
    log_path: str
    secrets: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)


@dataclass(frozen=True)
class ProcessPlace:
    """A process: Ray's id of its node, the node's address, and its process id."""

    node_id: str
    host: str
    process_id: int


class RayWorker:
    """Hosts one rank of one model."""

    def __init__(self, settings: WorkerSettings) -> None:
        threads = str(settings.threads.count_threads(count_cores()))
        # Before torch is imported; Ray has set them to the CPUs that the actor reserves.
        os.environ.update(settings.secrets, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
        for entry in settings.import_path:
            if entry not in sys.path:
                sys.path.append(entry)
        _redirect_output(Path(settings.log_path))
        # Workers of every rank spend these seconds now, side by side, not one step at a time.
        import torch  # noqa: F401

        self._collectives = CollectiveLog()
        install(self._collectives)
        self._stage, self._stage_start_s = "starting", time.time()
        self._context: WorkerContext | None = None
        self._store: Any = None

    def node(self) -> ProcessPlace:
        """Where this worker is."""
        import ray

        node_id = ray.get_runtime_context().get_node_id()
        return ProcessPlace(node_id, ray.util.get_node_ip_address(), os.getpid())

    def host_store(self, host: str, timeout_s: float) -> int:
        """Open the store of the replica's process world; gives its port."""
        from chatlearn.parallel.sockets import open_store

        self._store = open_store(host, timeout_s)
        return self._store.port

    def join(
        self,
        identity_fields: dict[str, Any],
        layout: ParallelLayout,
        module: bytes,
        address: tuple[str, int],
    ) -> None:
        """Join the replica's process world and take the module in."""
        from datetime import timedelta

        import torch
        import torch.distributed as dist
        from ray import cloudpickle

        from chatlearn.runtime.process_world import WorkerIdentity, join_world

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        identity = WorkerIdentity(layout=layout, **identity_fields)
        if self._store is None:
            timeout = timedelta(seconds=identity.timeout_s)
            self._store = dist.TCPStore(*address, None, is_master=False, timeout=timeout)
        store = dist.PrefixStore("world", self._store)
        self._context = join_world(identity, cloudpickle.loads(module), store)

    def run(
        self, call: tuple[Callable[..., Any], tuple[Any, ...]], num_outputs: int, line: str
    ) -> Any:
        """Run `function(context, *args)`; whatever it raises leaves as a WorkerError.

        That includes SystemExit, of which Ray would only say that the process is gone. A
        KeyboardInterrupt from outside reaches the main thread, where no function runs.
        """
        function, args = call
        import ray

        from chatlearn.runtime.remote_values import resolve_arguments

        context = self._context
        if context is None:
            raise RuntimeError("a worker runs functions only after it has joined its world")
        self._enter(_stage_name(function, args))
        try:
            resolved = resolve_arguments(args, ray.get)
            result = function(context, *resolved)
            if num_outputs > 1 and len(result) != num_outputs:
                raise ValueError(f"{function} gave {len(result)} outputs, expected {num_outputs}")
        except BaseException as error:  # noqa: BLE001 - whatever a user's code raises is reported
            if _is_from_outside(error):
                raise
            raise self._describe(error, line) from None
        finally:
            self._enter("idle")
        return result

    def shut_down(self) -> None:
        """Close the worker's resources and leave the process world."""
        from chatlearn.runtime.process_world import close_world

        if self._context is not None:
            self._context.close()
        close_world()

    def watch(self) -> None:
        """Never returns: the call fails when the process dies, and so tells the driver."""
        threading.Event().wait()

    def beat(self) -> Beat:
        """What this worker does; answered while a call runs, too."""
        stage, start_s = self._stage, self._stage_start_s
        return Beat(stage, time.time() - start_s, self._collectives.describe())

    def stack(self) -> str:
        """The Python stacks of all threads, for messages about a call that does not end."""
        frames = sys._current_frames()
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        return "\n".join(
            f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame)[-6:])}"
            for ident, frame in frames.items()
        )

    def _enter(self, stage: str) -> None:
        self._stage, self._stage_start_s = stage, time.time()

    def _describe(self, error: BaseException, line: str) -> WorkerError:
        import ray.exceptions

        if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, WorkerError):
            return error.cause
        if isinstance(error, WorkerError):
            return error
        context = self._context
        found = WorkerError(
            f"{type(error).__name__}: {error}",
            model_name=context.model_name if context else "",
            rank=context.rank if context else 0,
            replica=context.replica if context else 0,
            node=context.host if context else "",
            flow_line=line,
            worker_traceback="".join(traceback.format_exception(error)),
        )
        # Rows are lost with the node that held them.
        found.has_lost_rows = isinstance(error, ray.exceptions.ObjectLostError)
        found.is_collateral = is_broken_connection(error) or found.has_lost_rows
        return found


def _stage_name(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """The call's function, with the method that a stage calls."""
    name = getattr(function, "__name__", "call")
    method = getattr(args[0], "method_name", "") if args else ""
    return f"{name} {method}".rstrip()


def _is_from_outside(error: BaseException) -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    return isinstance(error, KeyboardInterrupt) and is_main


def _redirect_output(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
