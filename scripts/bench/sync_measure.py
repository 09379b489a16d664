"""Measures one benchmark case: the sync, its bare limit and two other ways, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from chatlearn.sync.programs import NUM_TURNS, build_programs
from scripts.bench.sync_baselines import (
    clear_weights,
    count_differing,
    forget_buffers,
    forget_weights,
    gather_broadcast,
    keep_weights,
    time_digests,
    time_gloo,
    time_memcpy,
)
from scripts.bench.sync_bounds import count_least_bytes
from scripts.bench.sync_gather import plan_gather_broadcast
from scripts.bench.sync_megatron import swap_weights

if TYPE_CHECKING:
    from chatlearn.sync.records import SyncPlan
    from chatlearn.sync.synchronizer import WeightSynchronizer
    from scripts.bench.sync_rig import Rig

__all__ = ["CaseResult", "WrongWeightsError", "measure_rig", "summarize"]

_DIGEST_TURNS = 9
TRANSPORTS = ("collective", "auto")


class WrongWeightsError(Exception):
    """A way of moving weights gave others than its peers, or moved more than it must."""


@dataclass(frozen=True)
class CaseResult:
    """What one case gave over one transport; seconds are medians.

    Attributes:
        case: its name.
        transport: `shared_memory` or `gloo`.
        colocated: whether both models share devices.
        bytes_moved: payload, by the plan.
        bytes_minimal: by `count_least_bytes`.
        seconds: of a sync, as the driver sees it.
        limit_seconds: of one memcpy, or one raw gloo transfer, of `bytes_minimal` bytes.
        fraction_of_limit: `limit_seconds / seconds`; 1.0 where nothing must move.
        gather_broadcast_seconds: of gathering and broadcasting every parameter over gloo.
        speedup_over_gather_broadcast: how many times as long that takes as a sync.
        megatron_seconds: of Megatron-Core's `swap_model_weights` over gloo.
        megatron_bytes: that it brings to other ranks.
        two_pairs_seconds: of the bytes of the limit over two gloo connections at once, half each;
            None over shared memory.
        digest_share: part of `seconds` that digests take on the slowest source and destination.
        num_repeats: measurements behind each median.
    """

    case: str
    transport: str
    colocated: bool
    bytes_moved: int
    bytes_minimal: int
    seconds: float
    limit_seconds: float
    fraction_of_limit: float
    gather_broadcast_seconds: float
    speedup_over_gather_broadcast: float
    megatron_seconds: float
    megatron_bytes: int
    two_pairs_seconds: float | None
    digest_share: float
    num_repeats: int

    def as_json(self) -> dict[str, Any]:
        """The result as a row, rounded to what it is worth."""
        return {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(self).items()}


def measure_rig(case: str, rig: Rig, num_repeats: int) -> list[CaseResult]:
    """Measure one pair of models over each transport.

    Raises:
        WrongWeightsError: the ways of moving weights do not agree, or the plan moves too much.
    """
    results: list[CaseResult] = []
    for transport in TRANSPORTS:
        synchronizer = rig.build_synchronizer(transport)
        bench = _Bench(rig, synchronizer, is_shared=transport == "auto")
        bench.check_plan()
        bench.check_equality(is_first=transport == TRANSPORTS[0])
        results.append(bench.measure(case, num_repeats))
        synchronizer.close()
    rig.run(forget_buffers)
    return results


def summarize(seconds: Sequence[float]) -> float:
    """The median of what was measured."""
    return median(seconds)


class _Bench:
    """One synchronizer and what it is compared with.

    Args:
        rig: the workers.
        synchronizer: prepared.
        is_shared: it moves weights through shared memory.
    """

    def __init__(self, rig: Rig, synchronizer: WeightSynchronizer, *, is_shared: bool) -> None:
        self._rig = rig
        self._synchronizer = synchronizer
        self._is_shared = is_shared
        self._version = 0
        n = rig.num_sources
        self._least = count_least_bytes(rig.endpoints[:n], rig.endpoints[n:])
        self._parameters = plan_gather_broadcast(rig.endpoints, n)
        self._megatron_bytes = 0

    @property
    def _plan(self) -> SyncPlan:
        return self._synchronizer.plan

    def check_plan(self) -> None:
        """The plan moves what must move, and no more."""
        moved = self._plan.num_bytes - self._plan.bytes_by_link["process"]
        crossed = self._plan.bytes_by_link["network"]
        if (moved, crossed) != (self._least.between_processes, self._least.between_nodes):
            raise WrongWeightsError(
                f"the plan moves {moved} bytes between processes, {crossed} between nodes; the "
                f"least is {self._least}"
            )

    def check_equality(self, *, is_first: bool) -> None:
        """All ways give every destination the same bits.

        Args:
            is_first: remember what this sync gives, and judge the other ways; else compare this
                sync with what is remembered, which is then forgotten.
        """
        takers = self._rig.destinations
        ways: dict[str, Callable[[], object]] = {"the sync": self._sync}
        if is_first:
            self._rig.run(clear_weights, ranks=takers)
            self._sync()
            self._rig.run(keep_weights, ranks=takers)
            ways = {
                "gather and broadcast": self._gather_broadcast,
                "swap_model_weights": self._swap,
            }
        for name, way in ways.items():
            self._rig.run(clear_weights, ranks=takers)
            way()
            found = self._rig.run(count_differing, ranks=takers)
            if any(found.values()):
                raise WrongWeightsError(
                    f"{name} gives other weights than the first sync; differing tensors by "
                    f"endpoint: {found}"
                )
        if not is_first:
            self._rig.run(forget_weights, ranks=takers)

    def measure(self, case: str, num_repeats: int) -> CaseResult:
        """Alternate the ways, the first round to warm up."""
        rounds = [self._time_round() for _ in range(num_repeats + 1)][1:]
        found = {name: summarize([each[name] for each in rounds]) for name in rounds[0]}
        seconds, limit = found["sync"], found["limit"]
        least = self._least.between_processes
        return CaseResult(
            case=case,
            transport="shared_memory" if self._is_shared else "gloo",
            colocated=self._rig.is_colocated,
            bytes_moved=self._plan.num_bytes,
            bytes_minimal=least,
            seconds=seconds,
            limit_seconds=limit,
            fraction_of_limit=limit / seconds if least else 1.0,
            gather_broadcast_seconds=found["gather"],
            speedup_over_gather_broadcast=found["gather"] / seconds,
            megatron_seconds=found["megatron"],
            megatron_bytes=self._megatron_bytes,
            two_pairs_seconds=found.get("two pairs"),
            digest_share=self._time_digests() / seconds,
            num_repeats=num_repeats,
        )

    def _time_round(self) -> Mapping[str, float]:
        found = {"sync": self._sync(), "limit": self._limit()}
        if not self._is_shared:
            found["two pairs"] = self._limit(num_pairs=2)
        found["gather"] = _time(self._gather_broadcast)
        found["megatron"] = _time(self._swap)
        return found

    def _sync(self) -> float:
        self._version += 1
        return self._synchronizer.sync(self._version).seconds

    def _limit(self, num_pairs: int = 1) -> float:
        size, takers = self._least.between_processes, self._rig.destinations
        if self._is_shared:
            return self._rig.run(time_memcpy, size, ranks=takers[:1])[takers[0]]
        pairs = [(at, takers[at % len(takers)]) for at in range(num_pairs)]
        found = self._rig.run(time_gloo, pairs, size)
        return max(found[at] for at in takers)

    def _gather_broadcast(self) -> None:
        self._rig.run(gather_broadcast, self._parameters)

    def _swap(self) -> None:
        self._megatron_bytes = sum(self._rig.run(swap_weights).values())

    def _time_digests(self) -> float:
        """Seconds for digests in one sync: the slowest source, then the slowest destination."""
        programs = build_programs(self._plan, lambda _: not self._is_shared)
        step = NUM_TURNS // _DIGEST_TURNS
        totals: list[float] = []
        for turn in range(0, NUM_TURNS, step):
            slowest = 0.0
            for ranks in (self._rig.sources, self._rig.destinations):
                found = self._rig.run_each(
                    time_digests, lambda at, turn=turn: (programs[at].blocks_of_turn(turn),), ranks
                )
                slowest += max(found.values())
            totals.append(slowest)
        return summarize(totals)


def _time(way: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    way()
    return time.perf_counter() - start_s
