"""The model and the rows of the benchmarks, and the arithmetic of their work.

It imports the standard library only: the peers, in an environment of their own, read it too.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = [
    "BENCH_SHAPE",
    "EOS",
    "WIDE_SHAPE",
    "Row",
    "Shape",
    "draw_lengths",
    "draw_rows",
    "draw_tokens",
]

EOS = 1
_FIRST_PLAIN = 3  # 0 pads, 1 ends, 2 is unknown


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder: RMSNorm, rotary positions, gated MLP, untied embeddings, no biases."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 1024
    num_attention_heads: int = 4
    num_query_groups: int = 2
    vocab_size: int = 512
    max_sequence_length: int = 1024

    @property
    def head_size(self) -> int:
        """Channels of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Channels of the keys of one token and layer; as many of the values."""
        return self.num_query_groups * self.head_size

    @property
    def layer_weights(self) -> int:
        """Elements of the matrices of one layer: Q, K, V, output, gate, up, down."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.kv_size)
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters: matrices, norms, embedding and output layer."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        ends = 2 * self.vocab_size * self.hidden_size
        return self.num_layers * self.layer_weights + norms + ends

    def forward_flops(self, length: int, *, start: int = 0, num_logits: int | None = None) -> float:
        """Floating-point operations of a forward pass over one sequence.

        A product of [m, k] and [k, n] counts 2 m k n; norms, rotation and softmax count nothing.
        Attention is causal: position t reads t + 1 keys.

        Args:
            length: tokens that are computed.
            start: tokens whose keys and values are in the cache.
            num_logits: positions that go through the output layer; None: all computed ones.
        """
        outputs = length if num_logits is None else num_logits
        matrices = 2 * self.num_layers * self.layer_weights * length
        reads = length * start + length * (length + 1) / 2
        attention = 4 * self.num_layers * self.hidden_size * reads
        return matrices + attention + 2 * outputs * self.vocab_size * self.hidden_size

    def training_flops(self, length: int, num_logits: int | None = None) -> float:
        """Of forward and backward over one sequence: a backward pass is two forward passes."""
        return 3 * self.forward_flops(length, num_logits=num_logits)

    def cache_bytes(self, num_tokens: int, element_bytes: int) -> int:
        """Of the keys and values of so many tokens."""
        return 2 * self.num_layers * self.kv_size * num_tokens * element_bytes

    def as_fields(self) -> dict[str, Any]:
        """As Megatron's fields and this project's keys name them."""
        return asdict(self)

    def for_variable_lengths(self) -> Shape:
        """With 128 tokens: untrained, it ends a sequence at each token with probability 1/128."""
        return replace(self, vocab_size=128)


BENCH_SHAPE = Shape()
WIDE_SHAPE = Shape(
    hidden_size=1024, ffn_hidden_size=4096, num_attention_heads=16, num_query_groups=8
)


@dataclass(frozen=True)
class Row:
    """One sequence to train on; the loss is over the response."""

    prompt: list[int]
    response: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def draw_tokens(draw: random.Random, count: int, vocab_size: int) -> list[int]:
    """Random tokens that mean nothing special."""
    return [draw.randrange(_FIRST_PLAIN, vocab_size) for _ in range(count)]


def draw_lengths(draw: random.Random, count: int, cap: int) -> list[int]:
    """Long-tailed lengths: log-normal, median an eighth of the cap, at least 8 tokens."""
    return [min(cap, max(8, round(draw.lognormvariate(0.0, 1.0) * cap / 8))) for _ in range(count)]


def draw_rows(seed: int, lengths: list[int], vocab_size: int) -> list[Row]:
    """Rows of these lengths: a third is prompt."""
    draw = random.Random(seed)
    return [
        Row(
            draw_tokens(draw, length // 3, vocab_size),
            draw_tokens(draw, length - length // 3, vocab_size),
        )
        for length in lengths
    ]
