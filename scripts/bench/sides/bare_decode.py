# pyright: standard, reportPrivateImportUsage=false
"""A bare decode loop in torch: what a decoder costs with nothing around it."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.nn.functional import embedding, linear, rms_norm, silu

from scripts.bench.sides.gate import Gate, parse_side_arguments, serve_work
from scripts.bench.workload import Shape


class BareDecoder:
    """Random weights and a cache [batch, groups, length, head]; heads of a group are query rows."""

    def __init__(self, shape: Shape, batch: int, length: int, dtype: torch.dtype) -> None:
        self.shape, self.batch, self.dtype = shape, batch, dtype
        hidden, kv, ffn = shape.hidden_size, shape.kv_size, shape.ffn_hidden_size
        self.embed, self.head = (self._draw(shape.vocab_size, hidden) for _ in range(2))
        self.layers = [
            {
                "qkv": self._draw(hidden + 2 * kv, hidden),
                "out": self._draw(hidden, hidden),
                "gate_up": self._draw(2 * ffn, hidden),
                "down": self._draw(hidden, ffn),
            }
            for _ in range(shape.num_layers)
        ]
        cache = (shape.num_layers, 2, batch, shape.num_query_groups, length, shape.head_size)
        self.cache = torch.zeros(cache, dtype=dtype)
        half = torch.arange(0, shape.head_size, 2) / shape.head_size
        angles = torch.arange(length)[:, None] * 10000.0**-half
        self.cos, self.sin = (f(angles.repeat(1, 2)).to(dtype) for f in (torch.cos, torch.sin))

    def forward(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Logits [batch, vocab] after the last of `tokens` [batch, count] at `start`."""
        x = embedding(tokens, self.embed)
        for weights, cache in zip(self.layers, self.cache, strict=True):
            attended = self._attend(linear(self._norm(x), weights["qkv"]), cache, start)
            x = x + linear(attended, weights["out"])
            gate, up = linear(self._norm(x), weights["gate_up"]).chunk(2, dim=-1)
            x = x + linear(silu(gate) * up, weights["down"])
        return linear(self._norm(x[:, -1]), self.head).float()

    def generate(self, prompts: torch.Tensor, count: int) -> torch.Tensor:
        """Sample `count` tokens after prompts [batch, length]."""
        tokens, start, found = prompts, 0, []
        for _ in range(count):
            probabilities = self.forward(tokens, start).softmax(-1)
            start += tokens.shape[1]
            tokens = torch.multinomial(probabilities, 1)
            found.append(tokens)
        return torch.cat(found, dim=1)

    def _attend(self, qkv: torch.Tensor, cache: torch.Tensor, start: int) -> torch.Tensor:
        shape, count = self.shape, qkv.shape[1]
        sizes = [shape.hidden_size, shape.kv_size, shape.kv_size]
        q, k, v = (
            part.view(self.batch, count, -1, shape.head_size).transpose(1, 2)
            for part in qkv.split(sizes, dim=-1)
        )
        stop = start + count
        cache[0, :, :, start:stop], cache[1, :, :, start:stop] = self._rotate(k, start), v
        rows = self._rotate(q, start).reshape(
            self.batch, shape.num_query_groups, -1, shape.head_size
        )
        scores = rows @ cache[0, :, :, :stop].transpose(-1, -2) / math.sqrt(shape.head_size)
        if count > 1:
            later = torch.ones(count, stop, dtype=torch.bool).triu(1 + start)
            scores.unflatten(2, (-1, count)).masked_fill_(later, -math.inf)
        attended = scores.softmax(-1) @ cache[1, :, :, :stop]
        heads = attended.view(self.batch, shape.num_attention_heads, count, shape.head_size)
        return heads.transpose(1, 2).reshape(self.batch, count, shape.hidden_size)

    def _rotate(self, x: torch.Tensor, start: int) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        at = slice(start, start + x.shape[2])
        return x * self.cos[at] + torch.cat((-second, first), dim=-1) * self.sin[at]

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, (x.shape[-1],))

    def _draw(self, rows: int, columns: int) -> torch.Tensor:
        return (0.02 * torch.randn(rows, columns)).to(self.dtype)


def main() -> int:
    """Generate once for each order."""
    given = parse_side_arguments()
    options = given.options
    torch.set_num_threads(options["num_threads"])
    shape, batch = Shape(**options["shape"]), options["num_requests"]
    length = options["prompt_length"] + options["new_tokens"]
    decoder = BareDecoder(shape, batch, length, getattr(torch, options["dtype"]))
    prompts = torch.randint(3, shape.vocab_size, (batch, options["prompt_length"]))

    def generate(_: dict[str, Any]) -> dict[str, float]:
        return {"tokens": decoder.generate(prompts, options["new_tokens"]).numel()}

    with torch.inference_mode():
        hello = {"num_parameters": shape.num_parameters, "dtype": options["dtype"]}
        serve_work(Gate(given.address), generate, hello)
    return 0


if __name__ == "__main__":
    sys.exit(main())
