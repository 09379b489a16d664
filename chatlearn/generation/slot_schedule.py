"""Which sequence is in which slot, and what the next pass does. No tensors but logits.

A slot's index is a place in a row of sequences: first those that decode, then those that have a
slot but no token yet, in the order in which they came. Of these only the first can have a part of
its prompt in its slot, for prompts go through the model one after the other. So when sequences
leave, the last ones that decode fill their places, and at most one part of a prompt moves down.

A prompt whose samples have not all got a slot yet is kept in the slot behind the last one, with
the logits after it. There is never more than one, for its samples wait side by side.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chatlearn.generation.contract import DecodeRows, PromptChunk, SlotCopy
from chatlearn.generation.slot_state import NewSequence

if TYPE_CHECKING:
    from chatlearn.generation.prompts import PromptGroup, Sample
    from chatlearn.generation.slot_state import SlotState

__all__ = ["Joined", "Moves", "SlotSchedule"]


@dataclass(frozen=True)
class Joined:
    """Sequences that decode from now on.

    Attributes:
        sequences: in the order of their slots, which follow those that decoded before.
        copies: of their prompts.
        logits: [running, vocab] of all that decode now; None off the sampling ranks.
    """

    sequences: list[NewSequence]
    copies: list[SlotCopy]
    logits: torch.Tensor | None


@dataclass(frozen=True)
class Moves:
    """How the rest closes up; `sources[i]` goes to `targets[i]`.

    Attributes:
        sources: slots of sequences that decode.
        targets: slots that became free.
        copies: of keys and values, to be done in this order.
    """

    sources: list[int]
    targets: list[int]
    copies: list[SlotCopy]


class SlotSchedule:
    """The sequences of one call.

    Args:
        waiting: all of them, samples of a prompt side by side.
        num_slots: of the cache.
        chunk_tokens: prompt tokens of one pass, at most.
        in_waves: sequences enter only where no other is in a slot, and prompts are cut at
            multiples of `chunk_tokens`.

    Attributes:
        running: the sequences that decode, by slot.
    """

    def __init__(
        self, waiting: deque[Sample], num_slots: int, *, chunk_tokens: int, in_waves: bool
    ) -> None:
        self.running = list["Sample"]()
        self._waiting = waiting
        self._joining = deque["Sample"]()
        self._num_slots = num_slots
        self._chunk_tokens = chunk_tokens
        self._in_waves = in_waves
        self._step = 0
        self._longest = 0
        self._is_even = True

    @property
    def has_work(self) -> bool:
        """Whether a sequence is not finished."""
        return bool(self._waiting or self._joining or self.running)

    @property
    def num_running(self) -> int:
        """Sequences that decode; theirs are the first slots."""
        return len(self.running)

    def admit(self) -> None:
        """Give free slots to waiting sequences."""
        if self._in_waves and (self.running or self._joining):
            return
        num_free = self._num_slots - len(self.running) - len(self._joining)
        for _ in range(min(num_free, len(self._waiting))):
            sample = self._waiting.popleft()
            sample.group.num_waiting -= 1
            self._joining.append(sample)

    def next_chunks(self) -> list[PromptChunk]:
        """Parts of prompts for the next pass, up to the bound.

        In waves a prompt is cut where its own length says, whatever else is in the pass: keys that
        are read from the cache round otherwise than those of the same pass.
        """
        chunks = list[PromptChunk]()
        left = self._chunk_tokens
        previous: PromptGroup | None = None
        for slot, sample in enumerate(self._joining, len(self.running)):
            group = sample.group
            if group is previous or group.is_done:
                continue
            wanted = min(self._chunk_tokens, group.length - group.num_done)
            if left == 0 or (self._in_waves and wanted > left):
                break
            previous = group
            end = group.num_done + min(wanted, left)
            tokens = group.token_ids[group.num_done : end]
            chunks.append(PromptChunk(slot, group.num_done, tokens, end == group.length))
            left -= len(tokens)
            group.num_done = end
        return chunks

    def decode_rows(self, state: SlotState) -> DecodeRows | None:
        """The tokens that decode in the next pass."""
        num_running = len(self.running)
        if num_running == 0:
            return None
        return DecodeRows(
            state.last[:num_running],
            state.position[:num_running],
            self._longest + self._step,
            self._is_even,
        )

    def join(self, logits: torch.Tensor | None) -> Joined:
        """Let sequences whose prompts went through the model decode.

        Args:
            logits: of the pass: of the sequences that decoded, then after each prompt that ended.
        """
        if not self._joining:
            return Joined([], [], logits)
        num_before = len(self.running)
        ended = iter(logits[num_before:] if logits is not None else ())
        parts = [logits[:num_before]] if logits is not None and num_before else []
        copies, sequences = list[SlotCopy](), list[NewSequence]()
        while self._joining and self._joining[0].group.is_done:
            group = self._joining[0].group
            first = len(self.running)
            sequences += self._begin(group)
            count = len(self.running) - first
            row = group.logits if group.is_kept else next(ended, None)
            copies += self._share(group, first, count)
            # A row by itself, else the whole pass would stay in memory.
            group.logits = row.clone() if group.num_waiting and row is not None else None
            if row is not None:
                parts.append(row.expand(count, -1))
        if sequences:
            self._measure()
        return Joined(sequences, copies, torch.cat(parts) if len(parts) > 1 else _only(parts))

    def _begin(self, group: PromptGroup) -> list[NewSequence]:
        """Move the group's samples from those that join to those that decode."""
        begun = list[NewSequence]()
        while self._joining and self._joining[0].group is group:
            sample = self._joining.popleft()
            sample.ahead = group.length - self._step
            self.running.append(sample)
            row = sample.request.row_id
            begun.append(NewSequence(row.prompt, row.sample, group.length, sample.limit))
        return begun

    def _share(self, group: PromptGroup, first: int, count: int) -> list[SlotCopy]:
        """Bring a prompt to the slots of its samples, and keep it for those that wait."""
        if group.is_kept:
            return [SlotCopy(self._num_slots, first, count, group.length)]
        copies = list[SlotCopy]()
        if count > 1:
            copies.append(SlotCopy(first, first + 1, count - 1, group.length))
        if group.num_waiting:
            group.is_kept = True
            copies.append(SlotCopy(first, self._num_slots, 1, group.length))
        return copies

    def count_step(self) -> None:
        """Each sequence that decodes has got a token."""
        self._step += 1

    def leave(self, slots: Sequence[int]) -> Moves:
        """Take sequences out and close up.

        Args:
            slots: of sequences that decode, in rising order.
        """
        before, rest = len(self.running), len(self.running) - len(slots)
        gone = set(slots)
        targets = [slot for slot in slots if slot < rest]
        sources = [slot for slot in range(rest, before) if slot not in gone]
        copies = list[SlotCopy]()
        for source, target in zip(sources, targets, strict=True):
            sample = self.running[source]
            self.running[target] = sample
            # Its last token is not in the cache yet.
            copies.append(SlotCopy(source, target, 1, sample.ahead + self._step - 1))
        del self.running[rest:]
        if self._joining and self._joining[0].group.num_done:
            copies.append(SlotCopy(before, rest, 1, self._joining[0].group.num_done))
        self._measure()
        return Moves(sources, targets, copies)

    def _measure(self) -> None:
        lengths = {sample.ahead for sample in self.running}
        self._longest = max(lengths, default=0)
        self._is_even = len(lengths) < 2


def _only(parts: Sequence[torch.Tensor]) -> torch.Tensor | None:
    return parts[0] if parts else None
