"""The sequences in a cache's slots as tensors: no Python work per sequence and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from chatlearn.generation.sampling import SampledTokens
from chatlearn.parallel.counter_random import counter_uniform

__all__ = ["FinishedResponse", "FinishedSlots", "NewSequence", "SlotState"]

# Random numbers are made for this many steps at once.
_STEPS = 32


@dataclass(frozen=True)
class NewSequence:
    """What the state must know of a sequence that begins.

    Attributes:
        prompt: of the row id.
        sample: of the row id.
        prompt_length: tokens.
        limit: longest response, tokens.
    """

    prompt: int
    sample: int
    prompt_length: int
    limit: int


@dataclass(frozen=True)
class FinishedResponse:
    """A response that is complete.

    Attributes:
        slot: where it is.
        token_ids: [response] int64.
        logprobs: [response] float32.
        has_stopped: it ends with a stop token.
    """

    slot: int
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    has_stopped: bool


class FinishedSlots:
    """Which slots a step has finished; on a GPU it is known some time later.

    Args:
        is_done: [n] bool.
        kept: on a GPU, page-locked memory for at least as many; nobody else writes to it before
            `read`.
    """

    def __init__(self, is_done: torch.Tensor, kept: torch.Tensor | None) -> None:
        self._is_done = is_done
        self._event: torch.cuda.Event | None = None
        if kept is not None:
            self._is_done = kept[: len(is_done)]
            self._is_done.copy_(is_done, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[int]:
        """The slots, rising; waits until the step has come so far."""
        if self._event is not None:
            self._event.synchronize()
        return cast("list[int]", cast("Any", self._is_done.nonzero()[:, 0]).tolist())


class SlotState:
    """Last token, position, limit, random numbers and response of each slot.

    A sequence that is finished may stay in its slot for further steps: they do not count.

    Args:
        num_slots: of the cache.
        max_new_tokens: longest response.
        stop_token_ids: tokens that end a response.
        seed: of the random numbers.
        device: where everything lies.
    """

    def __init__(
        self,
        num_slots: int,
        max_new_tokens: int,
        stop_token_ids: Sequence[int],
        seed: int,
        device: torch.device,
    ) -> None:
        self._seed = seed
        self._stop = torch.tensor(sorted(stop_token_ids), dtype=torch.int64, device=device)
        self._has_stop = bool(stop_token_ids)
        self._slots = torch.arange(num_slots, device=device)
        self._steps = torch.arange(_STEPS, device=device)
        # Last token, tokens in the cache, response tokens, limit, row's prompt and sample, and 1
        # while the sequence is not finished.
        self._numbers = torch.zeros((7, num_slots), dtype=torch.int64, device=device)
        self.last, self.position, self._count, self._limit = self._numbers[:4]
        self._prompt, self._sample, self._open = self._numbers[4:]
        self._uniforms = torch.zeros((num_slots, _STEPS), dtype=torch.float64, device=device)
        self._column = 0
        # The last column takes what comes after a response of full length.
        shape = (num_slots, max_new_tokens + 1)
        self._token_ids = torch.zeros(shape, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(shape, dtype=torch.float32, device=device)
        # Two, for one step is read while the next one runs.
        self._kept = [
            torch.zeros(num_slots, dtype=torch.bool, pin_memory=True)
            for _ in range(2 if device.type == "cuda" else 0)
        ]

    def add(self, first: int, sequences: Sequence[NewSequence]) -> None:
        """Put sequences in the slots from `first` on; nothing of them is sampled yet."""
        rows = [[s.prompt_length - 1, 0, s.limit, s.prompt, s.sample, 1] for s in sequences]
        given = torch.tensor(rows, dtype=torch.int64, device=self._numbers.device)
        self._numbers[1:, first : first + len(rows)] = given.t()
        self._draw_numbers(first, first + len(rows))

    def next_uniforms(self, num_running: int) -> torch.Tensor:
        """[n] float64 for the next token of the first slots."""
        if self._column == _STEPS:
            self._column = 0
            self._draw_numbers(0, num_running)
        return self._uniforms[:num_running, self._column]

    def record(self, sampled: SampledTokens, num_running: int) -> FinishedSlots:
        """Append a token to each of the first slots; gives those that are finished now."""
        slots, count = self._slots[:num_running], self._count[:num_running]
        is_open = self._open[:num_running]
        self._token_ids[slots, count] = sampled.token_ids
        self._logprobs[slots, count] = sampled.logprobs
        self.last[:num_running] = sampled.token_ids
        # Position and count; both are rows of one table.
        self._numbers[1:3, :num_running] += is_open
        self._column += 1
        is_done = count >= self._limit[:num_running]
        if self._has_stop:
            is_done |= self._is_stop(sampled.token_ids)
        is_open.masked_fill_(is_done, 0)
        if not self._kept:
            return FinishedSlots(is_done, None)
        self._kept.reverse()
        return FinishedSlots(is_done, self._kept[0])

    def read(self, slots: Sequence[int]) -> list[FinishedResponse]:
        """Copies of what is in slots."""
        at = torch.tensor(slots, device=self._numbers.device)
        counts = cast("list[int]", cast("Any", self._count[at]).tolist())
        longest = max(counts)
        token_ids = self._token_ids[at, :longest].cpu()
        logprobs = self._logprobs[at, :longest].cpu()
        ends = self._is_stop(self._token_ids[at, self._count[at] - 1])
        stopped = cast("list[bool]", cast("Any", ends).tolist())
        return [
            FinishedResponse(slot, ids[:count].clone(), values[:count].clone(), has_stopped)
            for slot, ids, values, count, has_stopped in zip(
                slots, token_ids, logprobs, counts, stopped, strict=True
            )
        ]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Move sequences to other slots; none is both a source and a target."""
        device = self._numbers.device
        at, to = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        self._numbers[:, to] = self._numbers[:, at]
        for table in (self._uniforms, self._token_ids, self._logprobs):
            table[to] = table[at]

    def _is_stop(self, token_ids: torch.Tensor) -> torch.Tensor:
        return (token_ids[:, None] == self._stop).any(-1)

    def _draw_numbers(self, first: int, end: int) -> None:
        """Numbers of the steps from the current one to the end of the table."""
        rows = slice(first, end)
        positions = self._count[rows, None] + self._steps - self._column
        self._uniforms[rows] = counter_uniform(
            self._seed, self._prompt[rows, None], self._sample[rows, None], positions
        )
