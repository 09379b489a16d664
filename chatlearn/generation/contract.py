"""The contract between the generator and a model: slots of KV cache, prefill and decode.

A runner lives in every rank of a replica. All ranks run the same generator over the same
requests in lockstep; a runner hides tensor and pipeline parallelism behind `prefill` and
`decode`, and `exchange_tokens` makes every rank see the tokens that the last stage sampled.
"""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["ModelRunner"]


class ModelRunner(Protocol):
    """A causal language model with a KV cache of `num_slots` slots of `max_length` tokens."""

    @property
    def num_slots(self) -> int:
        """Sequences that can be in flight at once."""
        ...

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

    def prefill(
        self, slots: "torch.Tensor", token_ids: "torch.Tensor", lengths: "torch.Tensor"
    ) -> "torch.Tensor | None":
        """Fill the cache of `slots` with prompts.

        Args:
            slots: [batch] int64, distinct.
            token_ids: [batch, longest] int64, right-padded with any valid id.
            lengths: [batch] int64, real tokens of each prompt.

        Returns:
            [batch, vocab_size] float32 logits after each prompt's last token, or None.
        """
        ...

    def decode(
        self, slots: "torch.Tensor", token_ids: "torch.Tensor", positions: "torch.Tensor"
    ) -> "torch.Tensor | None":
        """Append one token to each slot.

        Args:
            slots: [batch] int64, distinct.
            token_ids: [batch] int64, the tokens to append.
            positions: [batch] int64, their positions (number of tokens already in the slot).

        Returns:
            [batch, vocab_size] float32 logits after the token, or None.
        """
        ...

    def exchange_tokens(
        self, token_ids: "torch.Tensor | None", logprobs: "torch.Tensor | None", batch: int
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Give every rank the sampled tokens ([batch] int64) and log-probabilities (float32).

        Called on every rank; arguments are None where `is_sampling_rank` is False.
        """
        ...
