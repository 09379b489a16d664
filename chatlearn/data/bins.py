"""Rows that are computed together, and what they cost in tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chatlearn.data.rows import RowId

__all__ = ["Bin", "Limits", "Row", "RowLoad", "cost_of", "group_rows", "is_within", "responses_of"]


class RowLoad(NamedTuple):
    """Tokens of one row: those of its prompt, and those of what follows it.

    A preference pair has both of its responses in `response`, and `copies` of 2: so often a model
    computes the prompt that does not compute it once for all.
    """

    prompt: int = 0
    response: int = 0
    copies: int = 1

    @property
    def unshared(self) -> RowLoad:
        """The same load for a model that computes each prompt with each response."""
        return RowLoad(0, self.prompt * self.copies + self.response)


@dataclass(frozen=True)
class Limits:
    """The most that one micro-batch holds; None: no limit."""

    rows: int | None = None
    tokens: int | None = None


class Row(NamedTuple):
    """One row of the batch; `prompt_key` is equal for rows that share a prompt."""

    position: int
    prompt_key: tuple[int, ...]
    prompt: int
    response: int

    @classmethod
    def of(cls, position: int, row_id: RowId, loads: Mapping[RowId, RowLoad]) -> Row:
        """The row at a position of the batch; one without any tokens counts as one token."""
        load = loads.get(row_id, RowLoad())
        # What several samples of a prompt have before them may differ, say after other turns.
        key = (row_id.prompt, load.prompt) if load.prompt else (position,)
        return cls(position, key, load.prompt, max(load.response, 0 if load.prompt else 1))


@dataclass
class Bin:
    """Rows that are computed together."""

    rows: list[Row] = field(default_factory=list[Row])
    tokens: int = 0
    prompts: Counter[tuple[int, ...]] = field(default_factory=Counter[tuple[int, ...]])

    def cost(self, rows: Sequence[Row]) -> int:
        """Tokens that rows of one prompt would add."""
        shared = 0 if rows[0].prompt_key in self.prompts else rows[0].prompt
        return shared + sum(row.response for row in rows)

    def gain(self, row: Row) -> int:
        """Tokens that go away with a row."""
        return row.response + (row.prompt if self.prompts[row.prompt_key] == 1 else 0)

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows in."""
        for row in rows:
            shared = 0 if row.prompt_key in self.prompts else row.prompt
            self.tokens += row.response + shared
            self.prompts[row.prompt_key] += 1
            self.rows.append(row)

    def remove(self, row: Row) -> None:
        """Give a row away."""
        self.tokens -= self.gain(row)
        self.rows.remove(row)
        self.prompts[row.prompt_key] -= 1
        if not self.prompts[row.prompt_key]:
            del self.prompts[row.prompt_key]

    def fits(self, rows: Sequence[Row], limits: Limits) -> bool:
        """Whether rows of one prompt may come in."""
        return is_within(len(self.rows) + len(rows), self.tokens + self.cost(rows), limits)

    def is_within(self, limits: Limits) -> bool:
        """Whether this is a micro-batch that may be."""
        return is_within(len(self.rows), self.tokens, limits)


def is_within(num_rows: int, num_tokens: int, limits: Limits) -> bool:
    """A row alone always is."""
    if num_rows <= 1:
        return True
    if limits.rows is not None and num_rows > limits.rows:
        return False
    return limits.tokens is None or num_tokens <= limits.tokens


def group_rows(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows by prompt, in the order of their first row."""
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(row.prompt_key, []).append(row)
    return list(groups.values())


def cost_of(rows: Sequence[Row]) -> int:
    """Tokens of rows of one prompt by themselves."""
    return rows[0].prompt + responses_of(rows)


def responses_of(rows: Sequence[Row]) -> int:
    """Tokens of rows without their prompts."""
    return rows[0].response if len(rows) == 1 else sum([row.response for row in rows])
