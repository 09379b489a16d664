"""Describes and plans weight syncs of the largest models, on one core, and simulates them.

`python -m scripts.bench.plan_scale [--json]`; the last line of `--json` is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from chatlearn.parallel.layout import ParallelLayout
from chatlearn.sync.plan import plan_sync
from chatlearn.sync.records import Endpoint
from chatlearn.sync.simulate import H100_CLUSTER, simulate_sync
from megatron_adapters.weights import describe_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CASES", "Case", "main", "plan_case"]

_MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
_DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class Case:
    """One sync: a model, the trainer's layout and that of the replicas, each on nodes of its own.

    Attributes:
        name: shown.
        model: file of its sizes.
        uneven: Megatron's fields of the trainer's pipeline.
        training: layout of the trainer.
        serving: layout of one replica.
        num_replicas: of the inference model.
        bar_s: describing and planning should take less, seconds on one core.
    """

    name: str
    model: str
    uneven: dict[str, int]
    training: ParallelLayout
    serving: ParallelLayout
    num_replicas: int
    bar_s: float


CASES = (
    Case(
        "DeepSeek-V3, 2,048 ranks to 32 x 32",
        "deepseek_v3.yaml",
        {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 2},
        ParallelLayout(tp_size=8, pp_size=16, dp_size=16, ep_size=64, etp_size=1),
        ParallelLayout(tp_size=8, dp_size=4, ep_size=32, etp_size=1),
        32,
        30.0,
    ),
    Case(
        "Llama 3 405B, 1,024 ranks to 16 x 16",
        "llama_405b.yaml",
        {"num_layers_in_first_pipeline_stage": 7, "num_layers_in_last_pipeline_stage": 7},
        ParallelLayout(tp_size=8, pp_size=16, dp_size=8),
        ParallelLayout(tp_size=8, pp_size=2),
        16,
        10.0,
    ),
)


def plan_case(case: Case) -> dict[str, Any]:
    """Describe both sides and plan; gives the figures."""
    fields = yaml.safe_load((_MODELS / case.model).read_text())
    start = time.perf_counter()
    given = describe_layout({**fields, **case.uneven}, case.training)
    taken = describe_layout(fields, case.serving)
    described = time.perf_counter()
    sources = _place("trainer", given, 1, first_node=0)
    first = len(sources) // _DEVICES_PER_NODE
    destinations = _place("policy", taken, case.num_replicas, first_node=first)
    plan = plan_sync(sources, destinations)
    planned = time.perf_counter()
    simulated = simulate_sync(plan, H100_CLUSTER)
    return {
        "case": case.name,
        "describe_s": described - start,
        "plan_s": planned - described,
        "bar_s": case.bar_s,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "num_buckets": len(plan.buckets),
        "num_hops": len(plan.hops),
        "bytes_by_link": dict(plan.bytes_by_link),
        "simulated_s": simulated.seconds,
        "lower_bound_s": simulated.lower_bound_s,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every case; gives the exit code."""
    parser = argparse.ArgumentParser(prog="plan_scale", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    found = [plan_case(case) for case in CASES]
    for each in found:
        terabytes = each["bytes_by_link"]["network"] / 1e12
        sys.stdout.write(
            f"{each['case']}: described in {each['describe_s']:.2f} s, planned in "
            f"{each['plan_s']:.2f} s (bar {each['bar_s']:g} s), peak {each['peak_gb']:.2f} GB; "
            f"{each['num_hops']:,} hops of {each['num_buckets']:,} buckets, {terabytes:.2f} TB "
            f"across nodes; simulated {each['simulated_s']:.3f} s, lower bound "
            f"{each['lower_bound_s']:.3f} s\n"
        )
    if options.json:
        sys.stdout.write(json.dumps({"cases": found}) + "\n")
    return 0


def _place(name: str, ranks: Sequence[Any], num_replicas: int, first_node: int) -> list[Endpoint]:
    """Ranks side by side on nodes of eight devices."""
    endpoints: list[Endpoint] = []
    for replica in range(num_replicas):
        for rank, shards in enumerate(ranks):
            number = len(endpoints)
            node, device = divmod(number, _DEVICES_PER_NODE)
            where = f"node {first_node + node}"
            endpoints.append(
                Endpoint(name, replica, rank, where, number, shards, f"device {device}")
            )
    return endpoints


if __name__ == "__main__":
    sys.exit(main())
