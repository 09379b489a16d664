"""Decoding of this project: a `PolicyInference` in a world of one rank."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Any

import torch

from chatlearn.data.rows import RowId
from megatron_adapters import PolicyInference
from scripts.bench.sides.gate import Gate, parse_side_arguments, serve_work
from scripts.bench.sides.megatron_world import count_parameters, set_up_alone
from scripts.bench.workload import EOS, Shape, draw_tokens


def main() -> int:
    """Answer prompts for each order."""
    given = parse_side_arguments()
    options = given.options
    torch.set_num_threads(options["num_threads"])
    shape = Shape(**options["shape"])
    generation = {
        "max_new_tokens": options["new_tokens"],
        "num_slots": options["num_slots"],
        "stop_token_ids": [EOS] if options["is_variable"] else [],
    }
    policy = set_up_alone(
        PolicyInference("policy"),
        {**shape.as_fields(), "pretrained": options["weights"], "generation": generation},
    )
    draw, numbers = random.Random(0), itertools.count()

    def generate(_: dict[str, Any]) -> dict[str, float]:
        count, length = options["num_requests"], options["prompt_length"]
        prompts = [torch.tensor(draw_tokens(draw, length, shape.vocab_size)) for _ in range(count)]
        policy.row_ids = tuple(RowId(next(numbers), 0) for _ in prompts)
        found = policy.forward_step({"prompt_token_ids": prompts})
        return {"tokens": sum(len(ids) for ids in found["response_token_ids"])}

    dtype = str(policy.settings.transformer.params_dtype).removeprefix("torch.")
    hello = {"num_parameters": count_parameters(policy), "dtype": dtype}
    serve_work(Gate(given.address), generate, hello)
    return 0


if __name__ == "__main__":
    sys.exit(main())
