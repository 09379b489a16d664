"""What a function that runs inside a worker is given.

One context lives in each worker process (in the `local` backend: one for each model in the
driver process). The runtime builds it, keeps it and closes it.
"""

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from chatlearn.parallel.layout import ParallelLayout

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

__all__ = ["Closable", "Profiler", "WorkerContext"]


class Closable(Protocol):
    """Something that outlives one call in a worker and must be closed with it."""

    def close(self) -> None:
        """Release what is held; called once."""
        ...


class Profiler(Protocol):
    """Looks at the calls of a worker while an episode is profiled."""

    def record(self, stage: str) -> AbstractContextManager[None]:
        """Around one call of a stage."""
        ...

    def add_tokens(self, count: int) -> None:
        """Tokens of the last call's rows."""
        ...


ClosableT = TypeVar("ClosableT", bound=Closable)


@dataclass
class WorkerContext:
    """The state of one worker, handed to every function that runs in it.

    Attributes:
        model_name: name of the model this worker is a rank of.
        module: the user's module object, living in this process.
        replica: index of the replica among the model's replicas.
        rank: rank within the replica's process world.
        layout: the replica's parallel layout.
        device: where the module's tensors live.
        data_parallel_group: ranks with the same shard as this one; None where there is one.
        host: address of the node, as other nodes reach it (loopback where there is one node).
        node_id: which node this worker is on; equal for workers of one host.
        process_id: operating system process; equal for models that share a process.
        timeout_s: bound of every collective.
        reserved_shm_bytes: shared memory of this host that is spoken for.
        unusable_reason: why the module must not be used now; empty where it may be.
        weights_version: how new the module's weights are: updates that this worker has made, where
            it is trained; else the number that the last sync or checkpoint gave them.
        profiler: what looks at the calls; None while nothing is profiled.
    """

    model_name: str
    module: Any
    replica: int
    rank: int
    layout: ParallelLayout
    device: "torch.device"
    data_parallel_group: "ProcessGroup | None"
    host: str
    node_id: str
    process_id: int
    timeout_s: float
    reserved_shm_bytes: int = 0
    unusable_reason: str = ""
    weights_version: int = 0
    profiler: Profiler | None = None
    _resources: dict[Hashable, Closable] = field(default_factory=dict[Hashable, Closable])

    def keep(self, key: Hashable, build: Callable[[], ClosableT]) -> ClosableT:
        """The resource kept under `key`, built by `build` where there is none yet."""
        if key not in self._resources:
            self._resources[key] = build()
        return self._resources[key]  # type: ignore[return-value]

    def drop(self, key: Hashable) -> None:
        """Close and forget the resource under `key`, if there is one."""
        resource = self._resources.pop(key, None)
        if resource is not None:
            resource.close()

    def close(self) -> None:
        """Close every resource, newest first."""
        for key in reversed(list(self._resources)):
            self.drop(key)
