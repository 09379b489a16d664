"""Generates responses over a model runner's cache slots.

A finished sequence leaves its slot and a waiting one takes it at once. Every rank of a replica runs
the same generator over the same requests, in lockstep on exchanged tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from chatlearn.errors import DataError
from chatlearn.generation.sampling import SampledTokens, SamplingParams, sample_tokens
from chatlearn.parallel.counter_random import counter_uniform

if TYPE_CHECKING:
    from chatlearn.data.rows import RowId
    from chatlearn.generation.contract import ModelRunner

__all__ = ["GenerationRequest", "GenerationResult", "Generator"]


@dataclass(frozen=True)
class GenerationRequest:
    """One sample to generate: its row, which decides its random numbers, and its prompt."""

    row_id: RowId
    prompt_token_ids: torch.Tensor


@dataclass(frozen=True)
class GenerationResult:
    """One generated response.

    Attributes:
        row_id: the request's.
        token_ids: [response] int64, the stop token included if it was sampled.
        logprobs: [response] float32, see SampledTokens.
        finish_reason: `stop` or `length`.
    """

    row_id: RowId
    token_ids: torch.Tensor
    logprobs: torch.Tensor
    finish_reason: str


@dataclass
class _Sequence:
    """One request while it is being generated."""

    index: int
    request: GenerationRequest
    limit: int
    slot: int = -1
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])

    @property
    def num_tokens(self) -> int:
        return len(self.request.prompt_token_ids) + len(self.token_ids)


class Generator:
    """Generates with one model.

    Args:
        runner: the model with its cache.
        params: how to sample.
        stop_token_ids: tokens that end a response.
        max_new_tokens: longest response.
        seed: with row id, sample and position it decides every random number.
        is_deterministic: go through the requests in waves of row order, so that batches and with
            them all rounding are the same from run to run, whatever arrives when.
    """

    def __init__(
        self,
        runner: ModelRunner,
        params: SamplingParams,
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        seed: int,
        *,
        is_deterministic: bool = False,
    ) -> None:
        self._runner = runner
        self._params = params
        self._stop = frozenset(stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._is_deterministic = is_deterministic

    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Generate a response for each request; results in the requests' order.

        Raises:
            DataError: a prompt is empty or leaves no room for a response; names its row.
        """
        sequences = [self._admit(index, request) for index, request in enumerate(requests)]
        if self._is_deterministic:
            sequences.sort(key=lambda sequence: sequence.request.row_id)
        waiting, running = deque(sequences), list[_Sequence]()
        free = list(range(self._runner.num_slots))
        done: dict[int, GenerationResult] = {}
        while waiting or running:
            if waiting and free and not (self._is_deterministic and running):
                joining = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
                for sequence in joining:
                    sequence.slot = free.pop(0)
                self._append(joining, self._prefill(joining))
                running.extend(joining)
            else:
                self._append(running, self._decode(running))
            for sequence in [s for s in running if self._is_finished(s)]:
                done[sequence.index] = self._result(sequence)
                running.remove(sequence)
                free.append(sequence.slot)
            free.sort()
        return [done[index] for index in range(len(requests))]

    def _admit(self, index: int, request: GenerationRequest) -> _Sequence:
        length = len(request.prompt_token_ids)
        room = self._runner.max_length - length
        if length == 0 or room < 1:
            raise DataError(
                f"row {request.row_id}: the prompt has {length} tokens; it needs at least 1 and at "
                f"most {self._runner.max_length - 1}, one less than max_sequence_length"
            )
        return _Sequence(index, request, min(room, self._max_new_tokens))

    def _prefill(self, sequences: Sequence[_Sequence]) -> SampledTokens:
        prompts = [sequence.request.prompt_token_ids for sequence in sequences]
        token_ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        logits = self._runner.prefill(_slots(sequences), token_ids, lengths)
        return self._sample(logits, sequences)

    def _decode(self, sequences: Sequence[_Sequence]) -> SampledTokens:
        last = torch.tensor([sequence.token_ids[-1] for sequence in sequences])
        positions = torch.tensor([sequence.num_tokens - 1 for sequence in sequences])
        logits = self._runner.decode(_slots(sequences), last, positions)
        return self._sample(logits, sequences)

    def _sample(self, logits: torch.Tensor | None, sequences: Sequence[_Sequence]) -> SampledTokens:
        sampled = None
        if logits is not None:
            rows = [sequence.request.row_id for sequence in sequences]
            counters = torch.tensor([(row.prompt, row.sample) for row in rows])
            positions = torch.tensor([len(sequence.token_ids) for sequence in sequences])
            numbers = counter_uniform(self._seed, counters[:, 0], counters[:, 1], positions)
            sampled = sample_tokens(logits, self._params, numbers)
        token_ids, logprobs = self._runner.exchange_tokens(
            sampled.token_ids if sampled is not None else None,
            sampled.logprobs if sampled is not None else None,
            len(sequences),
        )
        return SampledTokens(token_ids, logprobs)

    def _append(self, sequences: Sequence[_Sequence], sampled: SampledTokens) -> None:
        token_ids = cast("list[int]", cast("Any", sampled.token_ids).tolist())
        logprobs = cast("list[float]", cast("Any", sampled.logprobs).tolist())
        found = zip(sequences, token_ids, logprobs, strict=True)
        for sequence, token_id, logprob in found:
            sequence.token_ids.append(token_id)
            sequence.logprobs.append(logprob)

    def _is_finished(self, sequence: _Sequence) -> bool:
        is_full = len(sequence.token_ids) >= sequence.limit
        return is_full or sequence.token_ids[-1] in self._stop

    def _result(self, sequence: _Sequence) -> GenerationResult:
        return GenerationResult(
            sequence.request.row_id,
            torch.tensor(sequence.token_ids, dtype=torch.int64),
            torch.tensor(sequence.logprobs, dtype=torch.float32),
            "stop" if sequence.token_ids[-1] in self._stop else "length",
        )


def _slots(sequences: Sequence[_Sequence]) -> torch.Tensor:
    return torch.tensor([sequence.slot for sequence in sequences])
