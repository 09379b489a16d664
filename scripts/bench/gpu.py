"""One GPU: a 1B model's training step and decoding, against what the device can do.

Utilisation of the bf16 matrix-product rate in training; tokens per second of decoding at several
batch sizes beside the bound that reading weights and cache from memory sets. Without a GPU it says
so and measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

if not __package__:
    # Started as a file: what is beside it must not hide installed packages.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from chatlearn.data.rows import RowId
from megatron_adapters import PolicyInference, PolicyTrainer
from scripts.bench.limits import measure_copy, measure_matmul
from scripts.bench.measures import say
from scripts.bench.sides.megatron_world import set_up_alone, train_once
from scripts.bench.sides.steps import StepPlan, build_steps
from scripts.bench.workload import Shape, draw_tokens

__all__ = ["ONE_BILLION", "compute_decode_bound", "main"]

ONE_BILLION = Shape(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32000,
    max_sequence_length=2048,
)
_PROMPT, _NEW = 16, 240
_BF16_BYTES = 2


@dataclass(frozen=True)
class Figure:
    """One line of the table; `share` is that of the bound."""

    name: str
    value: float
    bound: float
    unit: str

    def as_json(self) -> dict[str, Any]:
        """For the last line."""
        share = round(self.value / self.bound, 4)
        return {"name": self.name, "value": self.value, "bound": self.bound, "share": share}


@dataclass(frozen=True)
class _Settings:
    """Measurements behind a median, and how many kernels of a profile to show."""

    rounds: int
    num_kernels: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; gives the exit code."""
    parser = argparse.ArgumentParser(prog="scripts/bench/gpu.py", description=__doc__)
    parser.add_argument("--json", action="store_true", help="end with a line of JSON")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64, 512], help="of decoding")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-training", action="store_true", help="leave training out")
    parser.add_argument("--profile", type=int, default=0, help="show so many kernels of each")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        say("no GPU here: nothing is measured")
        return 0
    settings = _Settings(given.rounds, given.profile)
    figures: list[Figure] = []
    if not given.no_training:
        figures.append(_measure_training(settings))
        _free_memory()
    bandwidth = 2 * measure_copy(1 << 30, "cuda")  # each byte is read once and written once
    figures.extend(_measure_decoding(given.batches, bandwidth, settings))
    _print(figures)
    if given.json:
        found = {"device": torch.cuda.get_device_name(), "figures": [f.as_json() for f in figures]}
        print(json.dumps(found))
    return 0


def compute_decode_bound(
    shape: Shape, batch: int, *, prompt: int, new_tokens: int, bytes_per_s: float
) -> float:
    """Most tokens per second where each step reads all weights and the cache once, in bf16.

    Of the embedding table only the rows of the batch are read, which counts nothing. The prompts'
    pass counts nothing either, so the bound is a little too high.
    """
    mean_context = prompt + new_tokens / 2
    weights = shape.num_layers * shape.layer_weights + shape.vocab_size * shape.hidden_size
    cache = shape.cache_bytes(round(batch * mean_context), _BF16_BYTES)
    return batch * bytes_per_s / (_BF16_BYTES * weights + cache)


def _measure_training(settings: _Settings) -> Figure:
    shape = ONE_BILLION
    fields = {**shape.as_fields(), "bf16": True, "lr": 1e-5}
    trainer = set_up_alone(PolicyTrainer("trainer"), fields, {"algorithm": {"loss": "sft"}})
    steps = build_steps(StepPlan(16, 4, 2048, is_variable=False), shape.vocab_size)

    def train() -> float:
        step = next(steps)
        train_once(trainer, step)
        return sum(shape.training_flops(len(r), len(r.response)) for rows in step for r in rows)

    rate = _median_rate(train, settings)
    product = measure_matmul(8192, torch.bfloat16, "cuda")
    return Figure("training, 1B, 32k tokens a step", rate / 1e12, product / 1e12, "TFLOP/s")


def _measure_decoding(
    batches: Sequence[int], bytes_per_s: float, settings: _Settings
) -> Iterator[Figure]:
    shape = ONE_BILLION
    fields = {
        **shape.as_fields(),
        "max_sequence_length": _PROMPT + _NEW,  # the cache holds no more
        "bf16": True,
        "generation": {"max_new_tokens": _NEW},
    }
    policy = set_up_alone(PolicyInference("policy"), fields)
    draw, numbers = random.Random(0), itertools.count()
    for batch in batches:

        def decode(batch: int = batch) -> float:
            prompts = [draw_tokens(draw, _PROMPT, shape.vocab_size) for _ in range(batch)]
            policy.row_ids = tuple(RowId(next(numbers), 0) for _ in prompts)
            found = policy.forward_step({"prompt_token_ids": [torch.tensor(p) for p in prompts]})
            return sum(len(ids) for ids in found["response_token_ids"])

        rate = _median_rate(decode, settings)
        bound = compute_decode_bound(
            shape, batch, prompt=_PROMPT, new_tokens=_NEW, bytes_per_s=bytes_per_s
        )
        yield Figure(f"decoding, 1B, batch {batch}", rate, bound, "tokens/s")


def _free_memory() -> None:
    """Megatron's models hang in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def _median_rate(work: Callable[[], float], settings: _Settings) -> float:
    """Of what `work` gives, per second; the first time does not count."""
    work()
    rates: list[float] = []
    for _ in range(settings.rounds):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        amount = work()
        torch.cuda.synchronize()
        rates.append(amount / (time.perf_counter() - start_s))
    if settings.num_kernels:
        _show_kernels(work, settings.num_kernels)
    return statistics.median(rates)


def _show_kernels(work: Callable[[], float], count: int) -> None:
    """Where the device's time goes, and how long the host takes."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        work()
        torch.cuda.synchronize()
    events: list[Any] = list(cast("Any", profile).key_averages())
    kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    whole_us = sum(event.self_device_time_total for event in kernels)
    print(f"device busy {whole_us / 1e3:.1f} ms")
    for event in kernels[:count]:
        spent_us = event.self_device_time_total
        told = f"{spent_us / whole_us:6.1%} {spent_us / 1e3:9.2f} ms {event.count:7d}"
        print(f"{told} {event.key[:110]}")


def _print(figures: Sequence[Figure]) -> None:
    table = Table(title=f"One {torch.cuda.get_device_name()}, medians")
    for name in ("what", "measured", "bound", "share", "unit"):
        table.add_column(name)
    for each in figures:
        share = f"{each.value / each.bound:.0%}"
        table.add_row(each.name, f"{each.value:.1f}", f"{each.bound:.1f}", share, each.unit)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
