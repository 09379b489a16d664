"""Generates responses over a model runner's cache slots.

A finished sequence leaves its slot and a waiting one takes it at once. A prompt goes through the
model once for all its samples, in chunks, while other sequences go on decoding. Every rank of a
replica runs the same generator over the same requests, in lockstep on exchanged tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chatlearn.errors import DataError
from chatlearn.generation.prompts import group_by_prompt
from chatlearn.generation.sampling import SampledTokens, SamplingParams, sample_tokens
from chatlearn.generation.slot_schedule import SlotSchedule
from chatlearn.generation.slot_state import FinishedSlots, SlotState

if TYPE_CHECKING:
    from chatlearn.data.rows import RowId
    from chatlearn.generation.contract import ModelRunner
    from chatlearn.generation.prompts import Sample

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


@dataclass(frozen=True)
class _Launched:
    """A step whose outcome has not been looked at: its sequences by slot, and who finished."""

    running: tuple[Sample, ...]
    finished: FinishedSlots


class Generator:
    """Generates with one model.

    Args:
        runner: the model with its cache.
        params: how to sample.
        stop_token_ids: tokens that end a response.
        max_new_tokens: longest response.
        seed: with row id, sample and position it decides every random number.
        prefill_chunk_tokens: prompt tokens that go through the model in one step, at most.
        is_deterministic: go through the requests in waves of row order, so that batches and with
            them all rounding are the same from run to run, in whatever order requests arrive.
        looks_ahead: begin a step before it is known who finished in the one before, so that a GPU
            need not wait for the host; each sequence then takes part in one step too many, which
            does not count. None: on a GPU.
    """

    def __init__(
        self,
        runner: ModelRunner,
        params: SamplingParams,
        stop_token_ids: Sequence[int],
        max_new_tokens: int,
        seed: int,
        *,
        prefill_chunk_tokens: int = 2048,
        is_deterministic: bool = False,
        looks_ahead: bool | None = None,
    ) -> None:
        self._looks_ahead = runner.device.type == "cuda" if looks_ahead is None else looks_ahead
        self._runner = runner
        self._params = params
        self._stop = tuple(stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._seed = seed
        self._chunk_tokens = prefill_chunk_tokens
        self._is_deterministic = is_deterministic

    @torch.no_grad()
    def generate(self, requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        """Generate a response for each request; results in the requests' order.

        Raises:
            DataError: a prompt is empty or leaves no room for a response; names its row.
        """
        if not requests:
            return []
        limits = [self._limit(request) for request in requests]
        order = list(range(len(requests)))
        if self._is_deterministic:
            order.sort(key=lambda index: requests[index].row_id)
        lengths = [len(r.prompt_token_ids) + n for r, n in zip(requests, limits, strict=True)]
        num_slots = self._runner.reserve(len(requests), max(lengths))
        state = SlotState(num_slots, max(limits), self._stop, self._seed, self._runner.device)
        schedule = SlotSchedule(
            group_by_prompt(requests, limits, order),
            num_slots,
            chunk_tokens=self._chunk_tokens,
            in_waves=self._is_deterministic,
        )
        done: dict[int, GenerationResult] = {}
        before: _Launched | None = None
        while schedule.has_work:
            launched = self._step(schedule, state)
            due = before if self._looks_ahead else launched
            before = launched
            if due is not None:
                self._finish(due, schedule, state, done)
        return [done[index] for index in range(len(requests))]

    def _limit(self, request: GenerationRequest) -> int:
        length = len(request.prompt_token_ids)
        room = self._runner.max_length - length
        if length == 0 or room < 1:
            raise DataError(
                f"row {request.row_id}: the prompt has {length} tokens; it needs at least 1 and at "
                f"most {self._runner.max_length - 1}, one less than max_sequence_length"
            )
        return min(room, self._max_new_tokens)

    def _step(self, schedule: SlotSchedule, state: SlotState) -> _Launched | None:
        """Admit, run the model once, and sample; None where no sequence decodes yet."""
        schedule.admit()
        chunks = schedule.next_chunks()
        rows = schedule.decode_rows(state)
        logits = self._runner.forward(chunks, rows) if chunks or rows is not None else None
        joined = schedule.join(logits)
        self._runner.copy_slots(joined.copies)
        if joined.sequences:
            state.add(schedule.num_running - len(joined.sequences), joined.sequences)
        if schedule.num_running == 0:
            return None
        sampled = self._sample(joined.logits, state, schedule.num_running)
        finished = state.record(sampled, schedule.num_running)
        schedule.count_step()
        return _Launched(tuple(schedule.running), finished)

    def _finish(
        self,
        launched: _Launched,
        schedule: SlotSchedule,
        state: SlotState,
        done: dict[int, GenerationResult],
    ) -> None:
        """Let the sequences leave that a step has finished."""
        found = launched.finished.read()
        if not found:
            return
        # They may have another slot by now, or have left after the step before.
        ended = {id(launched.running[slot]) for slot in found}
        slots = [slot for slot, each in enumerate(schedule.running) if id(each) in ended]
        if not slots:
            return
        for response in state.read(slots):
            sample = schedule.running[response.slot]
            done[sample.index] = GenerationResult(
                sample.request.row_id,
                response.token_ids,
                response.logprobs,
                "stop" if response.has_stopped else "length",
            )
        moves = schedule.leave(slots)
        self._runner.copy_slots(moves.copies)
        if moves.sources:
            state.move(moves.sources, moves.targets)

    def _sample(
        self, logits: torch.Tensor | None, state: SlotState, num_running: int
    ) -> SampledTokens:
        sampled = None
        uniforms = state.next_uniforms(num_running)
        if logits is not None:
            sampled = sample_tokens(logits, self._params, uniforms)
        token_ids, logprobs = self._runner.exchange_tokens(
            sampled.token_ids if sampled is not None else None,
            sampled.logprobs if sampled is not None else None,
            num_running,
        )
        return SampledTokens(token_ids, logprobs)
