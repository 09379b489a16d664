# pyright: standard, reportPrivateImportUsage=false
"""The peer for decoding and for training steps: transformers, used as its guide says."""

from __future__ import annotations

import random
import sys
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.bench.sides.gate import Gate, parse_side_arguments, serve_work
from scripts.bench.sides.steps import StepPlan, build_steps
from scripts.bench.workload import EOS, Row, Shape, draw_tokens

if TYPE_CHECKING:
    from collections.abc import Callable

_PAD = 0
_IGNORED = -100


def build_llama(shape: Shape) -> LlamaForCausalLM:
    """A Llama of this shape with random weights, fp32."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_query_groups,
            max_position_embeddings=shape.max_sequence_length,
            pad_token_id=_PAD,
            bos_token_id=EOS,
            eos_token_id=EOS,
        )
    )


def build_generate(model: Any, options: dict[str, Any]) -> Callable[[Any], dict[str, float]]:
    """Answer all prompts, `batch_size` at a time; counts tokens up to the end token."""
    model.eval()
    draw = random.Random(0)
    new_tokens, vocab_size = options["new_tokens"], options["shape"]["vocab_size"]
    length = options["prompt_length"]
    shortest = {} if options["is_variable"] else {"min_new_tokens": new_tokens}

    def answer(count: int) -> int:
        prompts = torch.tensor([draw_tokens(draw, length, vocab_size) for _ in range(count)])
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            **shortest,
        )[:, length:]
        ends = found == EOS
        # A token counts unless an end token came before it.
        return int((ends.cumsum(1) - ends.long() == 0).sum())

    def generate(_: dict[str, Any]) -> dict[str, float]:
        count, size = options["num_requests"], options["batch_size"]
        return {"tokens": sum(answer(min(size, count - at)) for at in range(0, count, size))}

    return generate


def build_train(model: Any, options: dict[str, Any]) -> Callable[[Any], dict[str, float]]:
    """One AdamW step on right-padded micro-batches, gradients clipped as `Trainer` does."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    steps = build_steps(StepPlan(**options["plan"]), options["shape"]["vocab_size"])

    def train(_: dict[str, Any]) -> dict[str, float]:
        step = next(steps)
        trained = sum(len(row.response) for rows in step for row in rows)
        for rows in step:
            model(**_pad(rows, trained)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"tokens": sum(len(row) for rows in step for row in rows)}

    return train


def _pad(rows: list[Row], num_items: int) -> dict[str, Any]:
    """Tokens, mask and labels [rows, longest]; a batch without padding has no mask."""
    longest = max(map(len, rows))
    shape = (len(rows), longest)
    tokens, mask = torch.full(shape, _PAD), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, _IGNORED)
    for number, row in enumerate(rows):
        start, stop = len(row.prompt), len(row)
        tokens[number, :stop] = torch.tensor([*row.prompt, *row.response])
        mask[number, :stop] = 1
        labels[number, start:stop] = torch.tensor(row.response)
    columns = {"input_ids": tokens, "labels": labels, "num_items_in_batch": num_items}
    return columns if bool(mask.all()) else {**columns, "attention_mask": mask}


def main() -> int:
    """Generate or train, once for each order."""
    given = parse_side_arguments()
    options = given.options
    torch.set_num_threads(options["num_threads"])
    dtype = getattr(torch, options["dtype"])
    model = LlamaForCausalLM.from_pretrained(options["weights"], dtype=dtype)
    build = build_train if "plan" in options else build_generate
    count = sum(parameter.numel() for parameter in model.parameters())
    hello = {"num_parameters": count, "dtype": options["dtype"]}
    serve_work(Gate(given.address), build(model, options), hello)
    return 0


if __name__ == "__main__":
    sys.exit(main())
