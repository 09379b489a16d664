"""What `chatlearn plan` prints: each weight sync's plan, what it takes, and the least possible."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console

from chatlearn.cli.planned_syncs import describe_sides, naming_pair
from chatlearn.cli.tables import print_table
from chatlearn.errors import ConfigError
from chatlearn.sync.forecast import forecast_sync
from chatlearn.sync.plan import summarize_plan
from chatlearn.sync.simulate import CPU_HOST, H100_CLUSTER, ClusterSpeeds, simulate_sync

if TYPE_CHECKING:
    from chatlearn.config import Config
    from chatlearn.engine.planning import RunPlan
    from chatlearn.sync.records import SyncPlan
    from chatlearn.sync.simulate import SimulatedSync

__all__ = ["choose_speeds", "print_sync_plans"]

_GB = 1e9


@dataclass(frozen=True)
class _Forecast:
    """One pair, or why it cannot be planned before the workers run."""

    name: str
    plan: SyncPlan | None
    simulated: SimulatedSync | None
    reason: str = ""


def choose_speeds(
    *, is_gpu: bool, node_gb_s: float | None, network_gb_s: float | None, latency_us: float | None
) -> ClusterSpeeds:
    """The speeds that the command line states, else those of a usual machine of the kind.

    Raises:
        ConfigError: a speed is not above zero, or no finite number.
    """
    base = H100_CLUSTER if is_gpu else CPU_HOST
    for name, value in (("--node-gb-s", node_gb_s), ("--network-gb-s", network_gb_s)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} is {value:g}: give a speed above 0, in GB per second")
    if latency_us is not None and not 0 <= latency_us < math.inf:
        raise ConfigError(f"--latency-us is {latency_us:g}: give 0 or more, in microseconds")
    return ClusterSpeeds(
        base.process,
        base.device,
        base.node if node_gb_s is None else node_gb_s * _GB,
        base.network if network_gb_s is None else network_gb_s * _GB,
        base.latency_s if latency_us is None else latency_us / 1e6,
    )


def print_sync_plans(
    plan: RunPlan, config: Config, speeds: ClusterSpeeds, *, as_json: bool = False
) -> None:
    """Print every weight sync of a run.

    Args:
        plan: of the run.
        config: the resolved configuration.
        speeds: of the cluster.
        as_json: end with one JSON object on a line of its own.
    """
    console = Console(highlight=False)
    forecasts = [_forecast(pair, plan, config, speeds) for pair in plan.flows.syncs]
    if not forecasts:
        console.print("no weight sync: the engine sets no parameter sync")
    for forecast in forecasts:
        print_table(console, f"weight sync {forecast.name}", ("what", "value"), _rows(forecast))
    console.print()
    rates = f"{speeds.node / _GB:g} GB/s within a node, {speeds.network / _GB:g} GB/s across"
    console.print(f"speeds of one rank: {rates}, {speeds.latency_s * 1e6:g} us a hop", markup=False)
    if as_json:
        sys.stdout.write(json.dumps({"syncs": [_as_json(each) for each in forecasts]}) + "\n")


def _forecast(
    pair: tuple[str, str], plan: RunPlan, config: Config, speeds: ClusterSpeeds
) -> _Forecast:
    name = f"{pair[0]} -> {pair[1]}"
    sides = describe_sides(pair, plan, config)
    if isinstance(sides, str):
        return _Forecast(name, None, None, sides)
    with naming_pair(pair):
        made = forecast_sync(
            *sides,
            plan.placement,
            config.runtime.coalesced_buffer_mb << 20,
            is_one_process=config.runtime.backend == "local",
        )
    return _Forecast(name, made, simulate_sync(made, speeds))


def _rows(forecast: _Forecast) -> list[tuple[str, str]]:
    if forecast.plan is None or forecast.simulated is None:
        return [("not planned", forecast.reason)]
    simulated = forecast.simulated
    ratio = simulated.seconds / simulated.lower_bound_s if simulated.lower_bound_s else 1.0
    return [
        ("ranks", f"{forecast.plan.num_sources} -> {_num_takers(forecast.plan)}"),
        *summarize_plan(forecast.plan),
        ("simulated time", f"{simulated.seconds:.4g} s"),
        ("lower bound", f"{simulated.lower_bound_s:.4g} s ({ratio:.2f} times)"),
    ]


def _as_json(forecast: _Forecast) -> dict[str, object]:
    if forecast.plan is None or forecast.simulated is None:
        return {"sync": forecast.name, "not_planned": forecast.reason}
    return {
        "sync": forecast.name,
        "num_buckets": len(forecast.plan.buckets),
        "num_hops": len(forecast.plan.hops),
        "bytes_by_link": dict(forecast.plan.bytes_by_link),
        "seconds": forecast.simulated.seconds,
        "lower_bound_s": forecast.simulated.lower_bound_s,
    }


def _num_takers(plan: SyncPlan) -> int:
    return len(plan.endpoints) - plan.num_sources
