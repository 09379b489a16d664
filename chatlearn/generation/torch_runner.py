"""A model runner over any plain torch module that maps token ids to logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["TorchModelRunner"]


class TorchModelRunner:
    """Keeps the tokens of each slot and runs the whole prefix at every step: no cache.

    Args:
        model: maps [batch, seq] int64 token ids to [batch, seq, vocab] logits, causally.
        vocab_size: number of real tokens.
        num_slots: sequences in flight.
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
        self.num_slots = num_slots
        self.max_length = max_length
        self._model = model
        self._tokens = torch.zeros((num_slots, max_length), dtype=torch.int64)

    @torch.no_grad()
    def prefill(
        self, slots: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """See `ModelRunner.prefill`."""
        self._tokens[slots, : token_ids.shape[1]] = token_ids
        return self._logits(slots, lengths - 1)

    @torch.no_grad()
    def decode(
        self, slots: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """See `ModelRunner.decode`."""
        self._tokens[slots, positions] = token_ids
        return self._logits(slots, positions)

    def exchange_tokens(
        self, token_ids: torch.Tensor | None, logprobs: torch.Tensor | None, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """There is one rank: what was sampled is known."""
        if token_ids is None or logprobs is None:
            raise ValueError(f"a runner of one rank samples all {batch} tokens itself")
        return token_ids, logprobs

    def _logits(self, slots: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        logits = self._model(self._tokens[slots, : int(last.max()) + 1])
        rows = torch.arange(len(slots))
        return logits[rows, last, : self.vocab_size].float()
