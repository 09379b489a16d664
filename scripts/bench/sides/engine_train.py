"""Training steps of this project: a `PolicyTrainer` in a world of one rank, supervised."""

from __future__ import annotations

import sys
from typing import Any

import torch

from megatron_adapters import PolicyTrainer
from scripts.bench.limits import measure_matmul
from scripts.bench.sides.gate import Gate, parse_side_arguments, serve_work
from scripts.bench.sides.megatron_world import count_parameters, set_up_alone, train_once
from scripts.bench.sides.steps import StepPlan, build_steps
from scripts.bench.workload import Shape


def main() -> int:
    """Make one step for each order; for the order `matmul` a matrix product's rate."""
    given = parse_side_arguments()
    options = given.options
    torch.set_num_threads(options["num_threads"])
    shape = Shape(**options["shape"])
    fields = {**shape.as_fields(), "lr": 1e-4, **options.get("fields", {})}
    if "weights" in options:
        fields["pretrained"] = options["weights"]
    runtime = {"algorithm": {"loss": "sft"}}
    trainer = set_up_alone(PolicyTrainer("trainer"), fields, runtime)
    steps = build_steps(StepPlan(**options["plan"]), shape.vocab_size)
    dtype = trainer.settings.transformer.params_dtype

    def work(order: dict[str, Any]) -> dict[str, float]:
        if "matmul" in order:
            return {"flops_per_s": measure_matmul(order["matmul"], dtype)}
        step = next(steps)
        train_once(trainer, step)
        every = [row for rows in step for row in rows]
        flops = sum(shape.training_flops(len(row), len(row.response)) for row in every)
        return {"tokens": sum(map(len, every)), "flops": flops}

    hello = {
        "num_parameters": count_parameters(trainer),
        "dtype": str(dtype).removeprefix("torch."),
    }
    serve_work(Gate(given.address), work, hello)
    return 0


if __name__ == "__main__":
    sys.exit(main())
