"""The contract between the generator and a model: slots of KV cache and one forward pass a step.

A runner lives in every rank of a replica. All ranks run the same generator over the same
requests in lockstep; a runner hides tensor and pipeline parallelism behind `forward`, and
`exchange_tokens` makes every rank see the tokens that the last stage sampled.

The generator keeps the sequences that decode in the slots 0 to n - 1, so a runner may read its
cache through views. What a pass gets besides are chunks of prompts, whose slots follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["DecodeRows", "ModelRunner", "PromptChunk", "SlotCopy"]


@dataclass(frozen=True)
class PromptChunk:
    """Consecutive tokens of one prompt, to be added to its slot.

    Attributes:
        slot: where they go.
        start: tokens of the prompt that are in the slot already.
        token_ids: [tokens] int64, at least one.
        is_last: the prompt ends here, so the logits after it are wanted.
    """

    slot: int
    start: int
    token_ids: torch.Tensor
    is_last: bool


@dataclass(frozen=True)
class DecodeRows:
    """One token more for each of the slots 0 to n - 1.

    Attributes:
        token_ids: [n] int64, the tokens to append.
        positions: [n] int64, their positions: the tokens that are in the slot already.
        longest: largest of `positions` plus one.
        is_even: all positions are equal.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    longest: int
    is_even: bool


@dataclass(frozen=True)
class SlotCopy:
    """The first `length` tokens of a slot, copied to the slots from `target` on.

    Attributes:
        source: outside the target slots.
        target: the first slot that is written.
        num_targets: how many are.
        length: tokens.
    """

    source: int
    target: int
    num_targets: int
    length: int


class ModelRunner(Protocol):
    """A causal language model with a cache of keys and values."""

    @property
    def max_length(self) -> int:
        """Longest sequence (prompt and response), in tokens."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of real tokens; logits have exactly this many columns."""
        ...

    @property
    def is_sampling_rank(self) -> bool:
        """Whether this rank gets logits (last pipeline stage); elsewhere they are None."""
        ...

    @property
    def device(self) -> torch.device:
        """Where logits are, and the generator keeps its state."""
        ...

    def reserve(self, num_sequences: int, length: int) -> int:
        """Make room, and forget what the slots hold.

        Args:
            num_sequences: as many as could use a slot at once.
            length: tokens that a slot must hold.

        Returns:
            The number of slots, from 1 to `num_sequences`; the same on every rank. There is one
            more, whose index is this number: the generator keeps a prompt there.
        """
        ...

    def forward(
        self, chunks: Sequence[PromptChunk], rows: DecodeRows | None
    ) -> torch.Tensor | None:
        """Run new tokens through the model and keep their keys and values.

        Args:
            chunks: of different slots, none of which decodes.
            rows: the tokens to append to the slots that decode; None: none does.

        Returns:
            [n + last chunks, vocab_size] float32 logits: after each decoded token, then after each
            chunk that is its prompt's last, in the order of `chunks`. None off the sampling ranks.
        """
        ...

    def copy_slots(self, copies: Sequence[SlotCopy]) -> None:
        """Copy between slots, one after the other."""
        ...

    def exchange_tokens(
        self, token_ids: torch.Tensor | None, logprobs: torch.Tensor | None, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give every rank the sampled tokens ([batch] int64) and log-probabilities (float32).

        Called on every rank; arguments are None where `is_sampling_rank` is False.
        """
        ...
