"""Requests grouped by prompt: all samples of one prompt share its pass through the model."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from chatlearn.generation.generator import GenerationRequest

__all__ = ["PromptGroup", "Sample", "group_by_prompt"]


@dataclass
class PromptGroup:
    """Samples of one prompt.

    Attributes:
        token_ids: the prompt.
        num_waiting: samples without a slot yet.
        num_done: prompt tokens that went through the model.
        is_kept: its keys and values are in the slot behind the last one.
        logits: [vocab] float32 after the prompt, kept while samples wait; None off the sampling
            ranks.
    """

    token_ids: torch.Tensor
    num_waiting: int = 0
    num_done: int = 0
    is_kept: bool = False
    logits: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return len(self.token_ids)

    @property
    def is_done(self) -> bool:
        """The whole prompt went through the model."""
        return self.num_done == self.length


@dataclass(eq=False)
class Sample:
    """One request.

    Attributes:
        index: among the requests of the call.
        request: the request.
        limit: longest response, tokens.
        group: the samples of its prompt.
        ahead: tokens of the sequence minus steps of the generator, while it decodes.
    """

    index: int
    request: GenerationRequest
    limit: int
    group: PromptGroup = field(repr=False)
    ahead: int = 0


def group_by_prompt(
    requests: Sequence[GenerationRequest], limits: Sequence[int], order: Sequence[int]
) -> deque[Sample]:
    """Samples in the order of their prompts' first ones, those of one prompt side by side.

    Two requests share a prompt if the prompt numbers of their row ids and all token ids are equal.

    Args:
        requests: the requests.
        limits: longest response of each.
        order: indices of the requests.
    """
    by_number: dict[int, list[PromptGroup]] = {}
    members: dict[int, list[Sample]] = {}
    for index in order:
        request = requests[index]
        known = by_number.setdefault(request.row_id.prompt, [])
        tokens = request.prompt_token_ids
        group = next((group for group in known if torch.equal(group.token_ids, tokens)), None)
        if group is None:
            group = PromptGroup(tokens)
            known.append(group)
        group.num_waiting += 1
        sample = Sample(index, request, limits[index], group)
        members.setdefault(id(group), []).append(sample)
    return deque(sample for group in members.values() for sample in group)
