"""A model runner over any plain torch module that maps token ids to logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from chatlearn.generation.contract import DecodeRows, PromptChunk, SlotCopy

__all__ = ["TorchModelRunner"]


class TorchModelRunner:
    """Keeps the tokens of each slot and runs the whole prefix at every step: no cache.

    Args:
        model: maps [batch, seq] int64 token ids to [batch, seq, vocab] logits, causally.
        vocab_size: number of real tokens.
        num_slots: sequences in flight, at most.
        max_length: longest sequence, tokens.
    """

    is_sampling_rank = True

    def __init__(
        self,
        model: Callable[[torch.Tensor], torch.Tensor],
        vocab_size: int,
        num_slots: int,
        max_length: int,
    ) -> None:
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.device = torch.device("cpu")
        self._num_slots = num_slots
        self._model = model
        self._tokens = torch.zeros((num_slots + 1, max_length), dtype=torch.int64)

    def reserve(self, num_sequences: int, length: int) -> int:
        """See `ModelRunner.reserve`."""
        del length
        return min(self._num_slots, num_sequences)

    @torch.no_grad()
    def forward(self, chunks: Sequence[PromptChunk], rows: DecodeRows | None) -> torch.Tensor:
        """See `ModelRunner.forward`."""
        slots, last = list[int](), torch.empty(0, dtype=torch.int64)
        if rows is not None:
            slots, last = list(range(len(rows.token_ids))), rows.positions
            self._tokens[slots, rows.positions] = rows.token_ids
        for chunk in chunks:
            end = chunk.start + len(chunk.token_ids)
            self._tokens[chunk.slot, chunk.start : end] = chunk.token_ids
            if chunk.is_last:
                slots.append(chunk.slot)
                last = torch.cat([last, torch.tensor([end - 1])])
        if not slots:
            return torch.empty((0, self.vocab_size))
        logits = self._model(self._tokens[slots, : int(last.max()) + 1])
        return logits[torch.arange(len(slots)), last, : self.vocab_size].float()

    def copy_slots(self, copies: Sequence[SlotCopy]) -> None:
        """See `ModelRunner.copy_slots`."""
        for copy in copies:
            targets = slice(copy.target, copy.target + copy.num_targets)
            self._tokens[targets, : copy.length] = self._tokens[copy.source, : copy.length]

    def exchange_tokens(
        self, token_ids: torch.Tensor | None, logprobs: torch.Tensor | None, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """There is one rank: what was sampled is known."""
        if token_ids is None or logprobs is None:
            raise ValueError(f"a runner of one rank samples all {batch} tokens itself")
        return token_ids, logprobs
