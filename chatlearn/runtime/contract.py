"""The contract between the engine and a backend: workers, calls and remote values.

The engine, flow and sync packages know these names only; `chatlearn.runtime.ray_backend` and
`chatlearn.runtime.local_backend` fulfil them under one contract suite.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.placement import PlacementPlan

if TYPE_CHECKING:
    from chatlearn.config import Config

__all__ = ["Backend", "ModelSpec", "PendingCall", "RemoteValue", "WorkerGroup", "WorkerSummary"]


@dataclass(frozen=True)
class RemoteValue:
    """A value that lives where it was made; only a backend looks inside `handle`.

    May stand anywhere inside the arguments of `WorkerGroup.call`, also in lists, tuples, dicts
    and dataclass records: the worker has its value in that place when the function runs.
    """

    handle: Any


@dataclass(frozen=True)
class WorkerSummary:
    """Who a worker is, for plans and messages."""

    model_name: str
    replica: int
    rank: int
    node_id: str
    host: str
    process_id: int


@dataclass(frozen=True)
class PendingCall:
    """One function call on one worker, perhaps still running.

    Attributes:
        worker: who runs it.
        outputs: one handle per output of the function (`num_outputs` of `call`).
        flow_line: the flow line the call serves, for error messages; empty elsewhere.
    """

    worker: WorkerSummary
    outputs: tuple[RemoteValue, ...]
    flow_line: str = ""


@dataclass(frozen=True)
class ModelSpec:
    """What a backend needs to start the workers of one model."""

    name: str
    module: Any
    layout: ParallelLayout
    num_replicas: int
    is_cpu_only: bool = False


class WorkerGroup(Protocol):
    """The workers of one replica of one model."""

    @property
    def model_name(self) -> str:
        """Name of the model."""
        ...

    @property
    def replica(self) -> int:
        """Index of the replica."""
        ...

    @property
    def layout(self) -> ParallelLayout:
        """Layout of the replica."""
        ...

    @property
    def workers(self) -> tuple[WorkerSummary, ...]:
        """The workers by rank."""
        ...

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: Sequence[int] | None = None,
        num_outputs: int = 1,
        flow_line: str = "",
    ) -> tuple[PendingCall, ...]:
        """Start `function(context, *args)` on the given ranks (default: all), one call each.

        With `num_outputs` above 1 the function returns a tuple of that length and each entry
        can be fetched or passed on by itself. Calls on one worker run in the order given.
        """
        ...


class Backend(Protocol):
    """Starts workers and waits for their calls. Every wait is bounded."""

    def start(
        self, specs: Sequence[ModelSpec], placement: PlacementPlan, config: "Config"
    ) -> Mapping[str, tuple[WorkerGroup, ...]]:
        """Start every worker, join each replica's process world, and give groups by model."""
        ...

    def put(self, value: Any) -> RemoteValue:
        """Store a value where workers can read it."""
        ...

    def get(self, value: RemoteValue, timeout_s: float) -> Any:
        """Bring a value to the driver; errors as in `wait_any`."""
        ...

    def wait_any(self, calls: Sequence[PendingCall], timeout_s: float) -> tuple[PendingCall, ...]:
        """Block until at least one call is done; gives those that are.

        Raises:
            WorkerError: a call raised or its worker died. Where a death or an exception makes
                peers fail in turn (a broken collective), the first cause is the one raised.
            WaitTimeoutError: nothing was done in time; names the calls that were awaited.
        """
        ...

    def fetch(self, call: PendingCall, timeout_s: float, output: int = 0) -> Any:
        """The value of one output of a call; errors as in `wait_any`."""
        ...

    def check(self) -> None:
        """Raise the error of a worker that has died, if one has; does not wait for anything.

        Raises:
            WorkerError: the likeliest first cause.
        """
        ...

    def restart(self, model_name: str, replica: int) -> None:
        """Put new workers in the places of a replica's, some of which have died.

        Its group stays the same object; its ranks begin as after `start`. Calls that ran on it are
        lost.

        Raises:
            PlacementError: they do not start in time.
            WorkerError: one failed while it started.
        """
        ...

    def explain(self, workers: Sequence[WorkerSummary]) -> str:
        """What workers do now, for a message about these that do not answer; may be empty."""
        ...

    def stop(self) -> None:
        """Stop every worker; `start` may follow."""
        ...

    def close(self) -> None:
        """Stop every worker that was started, and the cluster if this backend started it."""
        ...
