"""How fast a Hugging Face folder is loaded and written, beside the disk and a plain read.

    .venv/bin/python -m scripts.bench.convert [--gigabytes 1] [--rounds 5] [--folder DIR] [--json]

Loading fills fresh tensors of a live layout (TP 1) from a folder whose pages are cached (warm) or
have been dropped from the cache (cold). A plain read is `readinto` a fresh buffer of the same size.
Exporting writes the folder, to the disk (`fsync`); the plain write is one file of the same size,
written from memory and synced. Ratios are of medians; sides alternate within a round.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch

from megatron_adapters.conversion.sources import describe_parts, make_tensors, open_source
from megatron_adapters.weights.export import export_shards, plan_export
from megatron_adapters.weights.pretrained import load_shards

_HIDDEN, _VOCABULARY = 2048, 32000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Loading and writing Hugging Face folders.")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the model, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="where to work; default: a temporary one")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="bench-convert-", dir=given.folder))
    try:
        found = _measure(scratch, given.gigabytes, given.rounds)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for name, value in found.items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
    if given.json:
        print(json.dumps(found))


def _measure(scratch: Path, gigabytes: float, rounds: int) -> dict[str, float | int | str]:
    folder = scratch / "model"
    _make_model(folder, gigabytes)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    source = open_source(folder)
    shards = [shard for part in describe_parts(source.model) for shard in part]
    fields = source.model.fields
    loaded: dict[str, torch.Tensor] = {}

    def load() -> None:
        loaded.clear()
        gc.collect()
        loaded.update(make_tensors(shards))
        load_shards(folder, shards, loaded, fields, head="lm")

    def read() -> None:
        view = memoryview(cast("Any", torch.empty(size, dtype=torch.uint8).numpy()))
        with file.open("rb", buffering=0) as opened:
            _fill(opened, view)

    def write() -> None:
        largest = max(loaded.values(), key=torch.Tensor.numel)
        data = memoryview(cast("Any", largest.view(-1).view(torch.uint8).numpy()))
        _write_plainly(scratch / "plain", data, size)

    def export() -> None:
        plan = plan_export(fields, head="lm", family=None, template=folder)
        export_shards(scratch / "out", plan, shards, loaded)

    load()
    times: dict[str, list[float]] = {}
    sides = {
        "load_warm": load,
        "read_warm": read,
        "load_cold": load,
        "read_cold": read,
        "export": export,
        "write": write,
    }
    for _ in range(rounds):
        for name, action in sides.items():
            if name.endswith("cold"):
                _drop(file)
            times.setdefault(name, []).append(_seconds(action))
            for left in ("plain", "out"):
                _remove(scratch / left)
    speed = {name: size / 1e9 / statistics.median(values) for name, values in times.items()}
    return {
        "model_gb": size / 1e9,
        "rounds": rounds,
        "load_warm_ratio": speed["load_warm"] / speed["read_warm"],
        "load_cold_ratio": speed["load_cold"] / speed["read_cold"],
        "export_ratio": speed["export"] / speed["write"],
        **{f"{name}_gb_s": value for name, value in speed.items()},
    }


def _fill(opened: FileIO, view: memoryview) -> None:
    at = 0
    while at < len(view):
        at += opened.readinto(view[at : at + (1 << 24)])


def _write_plainly(path: Path, data: memoryview, size: int) -> None:
    with path.open("wb", buffering=0) as opened:
        left = size
        while left:
            left -= opened.write(data[: min(left, len(data))])
        os.fsync(opened.fileno())


def _seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def _drop(file: Path) -> None:
    """Forget the file's pages, so that the next read comes from the disk."""
    opened = os.open(file, os.O_RDONLY)
    try:
        os.fsync(opened)
        os.posix_fadvise(opened, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(opened)


def _make_model(folder: Path, gigabytes: float) -> None:
    """A Llama in bf16 of about this size, without transformers' slow initial values."""
    from megatron_adapters.weights.families import FAMILIES

    per_layer = 4 * _HIDDEN * _HIDDEN * 2 + 3 * _HIDDEN * 4 * _HIDDEN * 2
    outer = 2 * _VOCABULARY * _HIDDEN * 2
    layers = max(1, round((gigabytes * 1e9 - outer) / per_layer))
    fields = {
        "num_layers": layers,
        "hidden_size": _HIDDEN,
        "ffn_hidden_size": 4 * _HIDDEN,
        "num_attention_heads": 16,
        "num_query_groups": 16,
        "kv_channels": _HIDDEN // 16,
        "vocab_size": _VOCABULARY,
        "max_sequence_length": 4096,
        "bf16": True,
    }
    from megatron_adapters.conversion.sources import SourceModel

    model = SourceModel(fields, "lm", "llama2", None, None, "bfloat16")
    shards = [shard for part in describe_parts(model) for shard in part]
    tensors = make_tensors(shards)
    for number, tensor in enumerate(tensors.values()):
        tensor.fill_(float(number % 7))
    plan = plan_export(fields, head="lm", family=FAMILIES["llama2"].name, template=None)
    export_shards(folder, plan, shards, tensors)


if __name__ == "__main__":
    main()
