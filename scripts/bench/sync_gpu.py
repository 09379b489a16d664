"""Weight sync between two models on one GPU, beside a copy on the device.

Trainer and server are Ray workers that share the device; the server reads the trainer's weights by
CUDA IPC. Stands beside it: one copy of as many bytes within a process. Without a GPU it says so and
measures nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if not __package__:
    # Started as a file: what is beside it must not hide installed packages.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from chatlearn.config import load_config
from chatlearn.engine.worker_calls import set_up_module
from chatlearn.runtime.contract import ModelSpec
from chatlearn.runtime.placement import DeviceInventory, build_requests, plan_placement
from chatlearn.runtime.ray_backend import RayBackend
from chatlearn.sync.copies import run_copies
from chatlearn.sync.programs import build_programs
from chatlearn.sync.shared_memory import OpenedTensors
from chatlearn.sync.state import Programs, SyncCall
from chatlearn.sync.synchronizer import SyncSettings, WeightSynchronizer
from scripts.bench.limits import measure_copy
from scripts.bench.measures import say
from scripts.bench.sync_baselines import time_digests
from scripts.bench.sync_model import QuickReference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.parallel.context import WorkerContext

__all__ = ["main"]

_NAMES = ("trainer", "server")
_TIMEOUT_S = 120.0
_TURNS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; gives the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench/sync_gpu.py", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--num-layers", type=int, default=40, help="of 177 million weights each")
    parser.add_argument("--num-repeats", type=int, default=9, help="behind each median")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        say("no GPU here: nothing is measured")
        return 0
    with tempfile.TemporaryDirectory(prefix="chatlearn-bench-") as folder:
        found = _measure(options.num_layers, options.num_repeats, Path(folder))
    print(
        f"{found['bytes'] / 1e9:.2f} GB: sync {1e3 * found['sync_s']:.2f} ms, of it pulls "
        f"{1e3 * found['pull_s']:.2f} ms and digests {1e3 * found['digest_s']:.2f} ms; a copy on "
        f"the device {1e3 * found['copy_s']:.2f} ms"
    )
    if options.json:
        print(json.dumps(found))
    return 0


def time_pulls(context: WorkerContext, key: str) -> float:
    """Seconds in which this rank copies everything that it takes, from mappings that are there."""
    programs = context.keep(("sync programs", key), _missing)
    opened = context.keep(("sync opened", key), OpenedTensors)
    live = {name: tensor.detach() for name, tensor in context.module.weight_tensors().items()}
    torch.cuda.synchronize()
    start_s = time.perf_counter()
    for source, copies in programs.copies_of(SyncCall(key, 0)).items():
        run_copies(copies, opened.tensors(source), live)
    torch.cuda.synchronize()
    return time.perf_counter() - start_s


def time_copy(context: WorkerContext, num_bytes: int) -> float:
    """Seconds of a copy of so many bytes on the device, at the rate of a large one."""
    return num_bytes / measure_copy(2 << 30, str(context.device))


def _missing() -> Programs:
    raise RuntimeError("there has been no sync yet")


def _measure(num_layers: int, num_repeats: int, folder: Path) -> dict[str, Any]:
    config = _build_config(num_layers)
    requests = build_requests(config, _NAMES, _NAMES[:1])
    placement = plan_placement(
        requests, config.runtime.colocation_groups, DeviceInventory(1, 1, "gpu")
    )
    specs = [ModelSpec(r.model_name, QuickReference(r.model_name), r.layout, 1) for r in requests]
    backend = RayBackend(folder / "logs")
    try:
        groups = backend.start(specs, placement, config)

        def run(name: str, function: Any, *given: Any) -> Any:
            (call,) = groups[name][0].call(function, *given)
            return backend.fetch(call, _TIMEOUT_S)

        for name in _NAMES:
            run(name, set_up_module, config.model(name), config.runtime, folder)
        synchronizer = WeightSynchronizer(
            backend, groups["trainer"], groups["server"], SyncSettings(_TIMEOUT_S)
        )
        synchronizer.prepare()
        link = synchronizer.plan.bytes_by_link
        size = synchronizer.plan.num_bytes
        if link["device"] != size:
            raise RuntimeError(f"not all bytes stay on the device: {dict(link)}")
        syncs = [synchronizer.sync(version).seconds for version in range(1, num_repeats + 2)][1:]
        programs = build_programs(synchronizer.plan, lambda _: False)
        digests = [
            sum(
                run(name, time_digests, programs[at].blocks_of_turn(turn))
                for at, name in enumerate(_NAMES)
            )
            for turn in range(_TURNS)
        ]
        pulls = [run("server", time_pulls, "trainer -> server") for _ in range(num_repeats)]
        return {
            "device": torch.cuda.get_device_name(),
            "bytes": size,
            "sync_s": statistics.median(syncs),
            "pull_s": statistics.median(pulls),
            "digest_s": statistics.median(digests),
            "copy_s": run("server", time_copy, size),
        }
    finally:
        backend.close()


def _build_config(num_layers: int) -> Any:
    shape = {
        "num_layers": num_layers,
        "hidden_size": 4096,
        "ffn_hidden_size": 11008,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "vocab_size": 32000,
        "max_sequence_length": 128,
        "bf16": True,
    }
    runtime = {"seed": 1, "colocation": [",".join(_NAMES)], "sync_timeout_s": _TIMEOUT_S}
    return load_config({"models": dict.fromkeys(_NAMES, shape), "runtime": runtime})


if __name__ == "__main__":
    sys.exit(main())
