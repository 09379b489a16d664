"""Pairs of answers for the demo's reward model."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.demo.problems import Problem, wrong_answers

__all__ = ["build_pairs"]

NUM_PAIRS = 6 * 2560


def build_pairs(
    problems: Sequence[Problem], samples: Sequence[Mapping[str, Any]], seed: int
) -> list[dict[str, str]]:
    """Right answers against wrong ones: half the policy's own mistakes, half made up.

    Args:
        problems: the training problems.
        samples: answers of the policy, with `prompt`, `response`, `answer`, `exact_match`.
        seed: of the draw.
    """
    draw = random.Random(f"pairs/{seed}")
    own = [
        {"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["response"]}
        for row in samples
        if not float(row["exact_match"]) and row["response"]
    ]
    pairs: list[dict[str, str]] = []
    while len(pairs) < NUM_PAIRS:
        if own and draw.random() < 0.5:
            pairs.append(draw.choice(own))
            continue
        problem = draw.choice(problems)
        rejected = draw.choice(wrong_answers(problem, draw))
        pairs.append({"prompt": problem.prompt, "chosen": problem.answer, "rejected": rejected})
    return pairs
