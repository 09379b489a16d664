"""The global batches that both sides train on: the same rows, cut alike. Standard library only."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scripts.bench.workload import Row, draw_lengths, draw_rows

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["StepPlan", "build_steps"]


@dataclass(frozen=True)
class StepPlan:
    """Which rows a training step gets.

    Attributes:
        num_rows: of one step.
        micro_batch_size: rows of one forward-backward pass.
        length: of each row, tokens; the cap where lengths vary.
        is_variable: lengths are long-tailed.
    """

    num_rows: int
    micro_batch_size: int
    length: int
    is_variable: bool


def build_steps(plan: StepPlan, vocab_size: int) -> Iterator[list[list[Row]]]:
    """Micro-batches of one step after another, without end."""
    for seed in itertools.count():
        draw = random.Random(seed)
        lengths = [plan.length] * plan.num_rows
        if plan.is_variable:
            lengths = draw_lengths(draw, plan.num_rows, plan.length)
        rows = draw_rows(seed, lengths, vocab_size)
        size = plan.micro_batch_size
        yield [rows[at : at + size] for at in range(0, len(rows), size)]
