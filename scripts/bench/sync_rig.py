"""The models of one benchmark case in real Ray workers: side by side, and colocated."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.config import load_config
from chatlearn.engine.worker_calls import set_up_module
from chatlearn.runtime.contract import ModelSpec
from chatlearn.runtime.placement import DeviceInventory, build_requests, plan_placement
from chatlearn.runtime.ray_backend import RayBackend
from chatlearn.sync.rank_calls import RankCalls
from chatlearn.sync.synchronizer import SyncSettings, WeightSynchronizer
from chatlearn.sync.transport import describe_endpoint
from scripts.bench.sync_baselines import WorldAddress, host_joint_store, join_joint_world
from scripts.bench.sync_megatron import list_group_ranks, prepare_megatron
from scripts.bench.sync_model import QuickReference

if TYPE_CHECKING:
    from chatlearn.config import Config
    from chatlearn.runtime.contract import WorkerGroup
    from chatlearn.sync.records import Endpoint

__all__ = ["CASES", "BenchCase", "Rig", "start_rigs"]

TIMEOUT_S = 120.0


@dataclass(frozen=True)
class BenchCase:
    """Two layouts: fields of the two models' sections of a config."""

    name: str
    source: Mapping[str, Any]
    destination: Mapping[str, Any]


_TP2 = {"num_gpu": 2, "tensor_model_parallel_size": 2}
CASES = (
    BenchCase("tp2-to-tp1", _TP2, {"num_gpu": 1}),
    BenchCase("tp1pp2-to-tp2", {"num_gpu": 2, "pipeline_model_parallel_size": 2}, _TP2),
    BenchCase("dp2-to-2-replicas", {"num_gpu": 2}, {"num_gpu": 2}),
)


class Rig:
    """Source and destination of one sync, and all their ranks joined in one world.

    Attributes:
        is_colocated: whether both models share a placement group and its devices.
        endpoints: descriptions of all ranks, sources first.
        num_sources: how many of them are sources.
    """

    def __init__(
        self,
        backend: RayBackend,
        sources: Sequence[WorkerGroup],
        destinations: Sequence[WorkerGroup],
        *,
        is_colocated: bool,
    ) -> None:
        self._backend = backend
        self._sources, self._destinations = sources, destinations
        self.is_colocated = is_colocated
        self.num_sources = sum(group.layout.world_size for group in sources)
        self._calls = RankCalls(backend, (*sources, *destinations), "benchmark", TIMEOUT_S)
        found = self.run(describe_endpoint)
        self.endpoints: list[Endpoint] = [found[at] for at in self.ranks]
        self._join()

    @property
    def ranks(self) -> range:
        """All ranks."""
        return range(self._calls.count)

    @property
    def sources(self) -> range:
        """Ranks of the source."""
        return range(self.num_sources)

    @property
    def destinations(self) -> range:
        """Ranks of the destination's replicas."""
        return range(self.num_sources, self._calls.count)

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks: Iterable[int] | None = None
    ) -> dict[int, Any]:
        """Run a function on ranks at once; gives the results."""
        return self.run_each(function, lambda _: arguments, ranks)

    def run_each(
        self,
        function: Callable[..., Any],
        arguments: Callable[[int], tuple[Any, ...]],
        ranks: Iterable[int] | None = None,
    ) -> dict[int, Any]:
        """Like `run`, with arguments by rank."""
        chosen = self.ranks if ranks is None else ranks
        deadline = self._calls.deadline()
        return self._calls.run(function, chosen, deadline, function.__name__, arguments)

    def build_synchronizer(self, transport: str) -> WeightSynchronizer:
        """A synchronizer of these two models, prepared; it replaces an earlier one."""
        made = WeightSynchronizer(
            self._backend,
            self._sources,
            self._destinations,
            SyncSettings(TIMEOUT_S, transport=transport),
        )
        made.prepare()
        return made

    def _join(self) -> None:
        (host, port) = self.run(host_joint_store, ranks=[0])[0]
        size = self._calls.count
        address = WorldAddress(host, port, size, self.num_sources, TIMEOUT_S)
        self.run_each(join_joint_world, lambda at: (address, at))
        layouts = self._sources[0].layout, self._destinations[0].layout
        given = list_group_ranks(layouts[0], len(self._sources), 0)
        taken = list_group_ranks(layouts[1], len(self._destinations), self.num_sources)
        self.run(prepare_megatron, given, taken)


@contextmanager
def start_rigs(
    case: BenchCase, shape: Mapping[str, Any], folder: Path
) -> Generator[tuple[Rig, ...]]:
    """Start the workers of a case, once side by side and once colocated; all end with the block.

    Args:
        case: the layouts.
        shape: Megatron's fields of both models.
        folder: of the workers' logs.
    """
    pairs = {False: ("trainer", "server"), True: ("shared_trainer", "shared_server")}
    config = _build_config(case, shape, pairs)
    names = [name for pair in pairs.values() for name in pair]
    requests = build_requests(config, names, [trainer for trainer, _ in pairs.values()])
    placement = plan_placement(
        requests, config.runtime.colocation_groups, DeviceInventory(1, None, "logical")
    )
    specs = [
        ModelSpec(r.model_name, QuickReference(r.model_name), r.layout, r.num_replicas)
        for r in requests
    ]
    backend = RayBackend(folder / "logs")
    try:
        groups = backend.start(specs, placement, config)
        _set_up(backend, groups, config, folder)
        yield tuple(
            Rig(backend, groups[trainer], groups[server], is_colocated=is_colocated)
            for is_colocated, (trainer, server) in pairs.items()
        )
    finally:
        backend.close()


def _build_config(
    case: BenchCase, shape: Mapping[str, Any], pairs: Mapping[bool, tuple[str, str]]
) -> Config:
    models = {
        name: {**shape, **fields}
        for pair in pairs.values()
        for name, fields in zip(pair, (case.source, case.destination), strict=True)
    }
    runtime = {"seed": 1, "colocation": [",".join(pairs[True])], "sync_timeout_s": TIMEOUT_S}
    return load_config({"models": models, "runtime": runtime})


def _set_up(
    backend: RayBackend,
    groups: Mapping[str, Sequence[WorkerGroup]],
    config: Config,
    folder: Path,
) -> None:
    calls = [
        call
        for name, replicas in groups.items()
        for group in replicas
        for call in group.call(set_up_module, config.model(name), config.runtime, folder)
    ]
    for call in calls:
        backend.fetch(call, TIMEOUT_S)
