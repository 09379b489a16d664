"""Token sequences of a micro-batch, read from its columns and checked."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatlearn.errors import DataError

__all__ = ["Rows", "check_token_ids", "read_rows", "read_temperature"]


@dataclass(frozen=True)
class Rows:
    """Token sequences of one micro-batch: prompts and responses, 1-D int64 each."""

    prompts: list[torch.Tensor]
    responses: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.prompts)) + sum(map(len, self.responses))

    def select(self, positions: Sequence[int]) -> "Rows":
        """Some of the rows, in this order."""
        return Rows(
            [self.prompts[at] for at in positions], [self.responses[at] for at in positions]
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 without rows."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return max((len(prompt) + len(response) for prompt, response in pairs), default=0)


def read_rows(
    data: Mapping[str, Any],
    prompt_key: str = "prompt_token_ids",
    response_key: str = "response_token_ids",
) -> Rows:
    """Prompts and responses of one micro-batch's columns (stacked tensors or lists).

    Raises:
        DataError: a column is missing; names it and those there are.
    """
    for key in (prompt_key, response_key):
        if key not in data:
            raise DataError(f"the batch has no column {key!r}; it has {', '.join(data) or 'none'}")
    return Rows(list(data[prompt_key]), list(data[response_key]))


def read_temperature(*batches: Mapping[str, Any]) -> float:
    """The temperature at which the rows were sampled, to score them alike; 1 where none says.

    Raises:
        DataError: rows were sampled at different temperatures.
    """
    found = {float(value) for data in batches for value in data.get("temperature", ())}
    if len(found) > 1:
        raise DataError(
            f"rows were sampled at the temperatures {sorted(found)}: train and score rows of one "
            "temperature together"
        )
    return found.pop() if found else 1.0


def check_token_ids(token_ids: Iterable[torch.Tensor], vocab_size: int) -> None:
    """Refuse ids that the model has no embedding for; split over ranks, those would be zeros.

    Raises:
        DataError: names the id and the vocabulary's size.
    """
    for ids in token_ids:
        if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < vocab_size):
            wrong = next(int(i) for i in ids if not 0 <= int(i) < vocab_size)
            raise DataError(
                f"got the token id {wrong}; the model's vocab_size is {vocab_size}: use the "
                "tokenizer that the model was made for"
            )
