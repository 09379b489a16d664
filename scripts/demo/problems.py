"""Addition of two numbers below 100 as text: problems, wrong answers, files, tokenizer.

Operands have two digits and answers three, zero-padded: `07+45=` is answered by `052`. A
carry-free answer adds digit by digit and forgets every carry (`042`): the mistake that the warm
start teaches beside the truth, and that reinforcement learning has to remove.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "Problem",
    "build_tokenizer",
    "split_problems",
    "warm_start_rows",
    "wrong_answers",
    "write_rows",
]

HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class Problem:
    """One addition problem."""

    first: int
    second: int

    @property
    def prompt(self) -> str:
        """The text up to the equals sign."""
        return f"{self.first:02d}+{self.second:02d}="

    @property
    def answer(self) -> str:
        """The right answer, three digits."""
        return f"{self.first + self.second:03d}"

    @property
    def carry_free_answer(self) -> str:
        """The answer of somebody who forgets every carry."""
        ones = (self.first + self.second) % 10
        tens = (self.first // 10 + self.second // 10) % 10
        return f"0{tens}{ones}"

    @classmethod
    def from_prompt(cls, prompt: str) -> Problem:
        """The problem that a prompt poses."""
        first, second = prompt.rstrip("=").split("+")
        return cls(int(first), int(second))

    def as_row(self) -> dict[str, str]:
        """What the verifier and the policy need."""
        return {"prompt": self.prompt, "answer": self.answer}


def split_problems(seed: int) -> tuple[list[Problem], list[Problem]]:
    """Training and held-out problems; a + b and b + a always fall on the same side."""
    pairs = [(a, b) for a in range(100) for b in range(a, 100)]
    random.Random(f"split/{seed}").shuffle(pairs)
    count = round(len(pairs) * HELD_OUT_SHARE)
    return _ordered(pairs[count:], seed), _ordered(pairs[:count], seed)


def warm_start_rows(
    problems: Sequence[Problem], count: int, carry_free_share: float, seed: int
) -> list[dict[str, str]]:
    """Supervised rows, some of them answered without carries.

    Args:
        problems: to draw from, with replacement.
        count: rows.
        carry_free_share: of the rows whose answer forgets the carries.
        seed: of the draw.
    """
    draw = random.Random(f"warm start/{carry_free_share}/{seed}")
    rows: list[dict[str, str]] = []
    for _ in range(count):
        problem = draw.choice(problems)
        is_wrong = draw.random() < carry_free_share
        response = problem.carry_free_answer if is_wrong else problem.answer
        rows.append({"prompt": problem.prompt, "response": response})
    return rows


def wrong_answers(problem: Problem, draw: random.Random) -> list[str]:
    """Three kinds of wrong answers: carry-free (where it is wrong), nearly right, random."""
    right = problem.first + problem.second
    near = right + draw.choice((-10, -1, 1, 10))
    candidates = [
        problem.carry_free_answer,
        f"{max(0, min(near, 198)):03d}",
        f"{draw.randrange(199):03d}",
    ]
    return [answer for answer in candidates if answer != problem.answer]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines."""
    lines = (json.dumps(row) for row in rows)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def build_tokenizer(prefix: Path, problems: Sequence[Problem]) -> Path:
    """Train a sentencepiece model of single characters on the data; gives its file."""
    import sentencepiece

    text = [problem.prompt + problem.answer for problem in problems]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(prefix),
        model_type="char",
        vocab_size=32,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        split_digits=True,
        pad_id=3,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def _ordered(pairs: Iterable[tuple[int, int]], seed: int) -> list[Problem]:
    """Both orders of each pair, shuffled."""
    problems = {Problem(a, b) for a, b in pairs} | {Problem(b, a) for a, b in pairs}
    listed = sorted(problems, key=lambda problem: (problem.first, problem.second))
    random.Random(f"order/{seed}").shuffle(listed)
    return listed
