"""Rows of different lengths as padded micro-batches, and back.

A response token is scored at the position before it, where the model predicts it; `mask` and all
per-token tensors here are aligned to these predicting positions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from chatlearn.errors import DataError

__all__ = [
    "PaddedBatch",
    "check_token_ids",
    "Rows",
    "pad_micro_batches",
    "read_rows",
    "read_temperature",
]


@dataclass(frozen=True)
class Rows:
    """Token sequences of one micro-batch: prompts and responses, 1-D int64 each."""

    prompts: list[torch.Tensor]
    responses: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 without rows."""
        pairs = zip(self.prompts, self.responses, strict=True)
        return max((len(prompt) + len(response) for prompt, response in pairs), default=0)


@dataclass(frozen=True)
class PaddedBatch:
    """One micro-batch as Megatron takes it.

    Attributes:
        token_ids: [rows, length] int64, right-padded; rows beyond `num_rows` fill up.
        position_ids: [rows, length] int64.
        targets: [rows, length] int64, the token after each position.
        mask: [rows, length] bool; True where `targets` is a response token.
        num_rows: real rows.
        extras: further per-token tensors [rows, length] or per-row tensors [rows], by name.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    targets: torch.Tensor
    mask: torch.Tensor
    num_rows: int
    extras: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def align(self, values: Iterable[torch.Tensor]) -> torch.Tensor:
        """Per-response-token values of each real row, put at their predicting positions.

        Args:
            values: one 1-D float tensor per row, as long as its response.

        Returns:
            [rows, length] float32, zero elsewhere.

        Raises:
            DataError: a row has not as many values as response tokens.
        """
        aligned = torch.zeros(self.mask.shape, dtype=torch.float32)
        for number, row in enumerate(values):
            count = int(self.mask[number].sum())
            if len(row) != count:
                raise DataError(f"row {number} has {len(row)} values for {count} response tokens")
            aligned[number, self.mask[number].cpu()] = row.float()
        return aligned.to(self.token_ids.device)

    def per_row(self, values: Sequence[float]) -> torch.Tensor:
        """One number per real row as [rows] float32, zero for rows that fill up."""
        column = torch.zeros(self.token_ids.shape[0], dtype=torch.float32)
        column[: len(values)] = torch.tensor(values, dtype=torch.float32)
        return column.to(self.token_ids.device)

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The inverse of `align`: for each real row its response tokens' values, on the CPU."""
        values, mask = values.detach().cpu(), self.mask.cpu()
        return [values[number][mask[number]] for number in range(self.num_rows)]

    def last_token_values(self, values: torch.Tensor) -> torch.Tensor:
        """[rows] values at each row's last token.

        Args:
            values: [rows, length] per token; position t belongs to token t.
        """
        last = torch.where(self.mask, torch.arange(self.mask.shape[1]) + 1, 0).amax(dim=1)
        return values.gather(1, last.to(values.device).unsqueeze(1)).squeeze(1)


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


def pad_micro_batches(
    micro_batches: Sequence[Rows],
    *,
    multiple: int,
    max_length: int,
    device: torch.device,
) -> list[PaddedBatch]:
    """Pad micro-batches to one common shape, so that pipeline stages agree on it.

    Args:
        micro_batches: some may have few rows or none.
        multiple: the length becomes a multiple of this (sequence parallelism).
        max_length: the model's context, tokens.
        device: where the tensors go.

    Raises:
        DataError: a row does not fit the model's context.
    """
    longest = max((rows.longest for rows in micro_batches), default=0)
    if longest > max_length:
        raise DataError(
            f"a row has {longest} tokens, more than max_sequence_length={max_length}: shorten it "
            "or raise max_sequence_length"
        )
    # One position is kept beyond the last token, so that `last_token_values` finds it.
    length = -(-max(longest, 1) // multiple) * multiple
    height = max((len(rows) for rows in micro_batches), default=1) or 1
    return [_pad(rows, height, length, device) for rows in micro_batches]


def _pad(rows: Rows, height: int, length: int, device: torch.device) -> PaddedBatch:
    token_ids = torch.zeros((height, length + 1), dtype=torch.int64)
    mask = torch.zeros((height, length), dtype=torch.bool)
    for number, (prompt, response) in enumerate(zip(rows.prompts, rows.responses, strict=True)):
        start, stop = len(prompt), len(prompt) + len(response)
        token_ids[number, :start] = prompt
        token_ids[number, start:stop] = response
        mask[number, start - 1 : stop - 1] = True
    positions = torch.arange(length).expand(height, length)
    return PaddedBatch(
        token_ids=token_ids[:, :length].contiguous().to(device),
        position_ids=positions.to(device),
        targets=token_ids[:, 1:].contiguous().to(device),
        mask=mask.to(device),
        num_rows=len(rows),
    )
