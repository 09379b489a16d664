"""What a GRPO step has to compute and to move, stage by stage. Pure; see `docs/performance.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scripts.bench.workload import Shape

__all__ = ["Stage", "StepSize", "bound_seconds", "list_stages"]

_FLOAT32_BYTES = 4
# Adam reads weight, gradient and two moments, and writes weight and moments; the gradient is also
# read for its norm and set to zero.
_ADAM_PASSES = 9


@dataclass(frozen=True)
class StepSize:
    """One GRPO step; all prompts and all responses are equally long.

    Attributes:
        num_prompts: distinct prompts.
        num_samples: responses of each.
        prompt_length: tokens.
        response_length: tokens.
        element_bytes: of weights and activations.
        cache_element_bytes: of keys and values; on a processor they are float32.
    """

    num_prompts: int = 8
    num_samples: int = 8
    prompt_length: int = 32
    response_length: int = 64
    element_bytes: int = _FLOAT32_BYTES
    cache_element_bytes: int = _FLOAT32_BYTES

    @property
    def num_rows(self) -> int:
        """Responses."""
        return self.num_prompts * self.num_samples


@dataclass(frozen=True)
class Stage:
    """What one part of the step needs at least.

    Attributes:
        name: of the stage.
        flops: floating-point operations in matrix products.
        num_bytes: weights, cache and optimizer state, read or written; activations count nothing.
    """

    name: str
    flops: float
    num_bytes: float


def list_stages(shape: Shape, step: StepSize) -> list[Stage]:
    """The stages of a step, in order."""
    weights = shape.num_layers * shape.layer_weights + shape.vocab_size * shape.hidden_size
    one_read = float(weights * step.element_bytes)
    length = step.prompt_length + step.response_length
    rows = step.num_rows
    # A prompt is computed once for its samples; its last position predicts for each of them.
    after = shape.forward_flops(
        step.response_length, start=step.prompt_length, num_logits=step.response_length
    )
    before = shape.forward_flops(step.prompt_length, num_logits=0)
    passes = after * rows + before * step.num_prompts
    prefill = shape.forward_flops(step.prompt_length, num_logits=1) * step.num_prompts
    # The prompt's pass gives the first token; the others take a step each.
    starts = range(step.prompt_length, length - 1)
    decode = sum(shape.forward_flops(1, start=start) for start in starts) * rows
    num_read = rows * sum(start + 1 for start in starts)
    cached = shape.cache_bytes(num_read, step.cache_element_bytes)
    optimizer = _ADAM_PASSES * shape.num_parameters * _FLOAT32_BYTES
    if step.element_bytes < _FLOAT32_BYTES:
        # The weights that the model calculates with are written beside the master copy.
        optimizer += shape.num_parameters * step.element_bytes
    return [
        Stage("prompts, each once", prefill, one_read),
        Stage("decoding", decode, len(starts) * one_read + cached),
        Stage("reference", passes, one_read),
        Stage("forward and backward", 3 * passes, 3 * one_read),
        Stage("optimizer", 0.0, float(optimizer)),
        Stage("weight sync", 0.0, float(2 * shape.num_parameters * step.element_bytes)),
    ]


def bound_seconds(stage: Stage, *, flops_per_s: float, bytes_per_s: float) -> float:
    """Least time of a stage on a machine with these limits."""
    return max(stage.flops / flops_per_s, stage.num_bytes / bytes_per_s)
