"""Chunks of prompts as packed tokens of one forward pass, without padding between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch

from chatlearn.generation.contract import PromptChunk

__all__ = ["ChunkGroup", "PackedChunks"]


@dataclass(frozen=True)
class ChunkGroup:
    """Chunks of equal length that attend in one call: all at their prompt's beginning, or one.

    Attributes:
        first: place of the first token in the pass.
        num_chunks: how many.
        tokens: of each.
        start: tokens that are in the slot before.
        slot: of the one chunk; unused for chunks at the beginning.
        mask: [tokens, start + tokens] bool, True where a token may look; None: causal.
    """

    first: int
    num_chunks: int
    tokens: int
    start: int
    slot: int
    mask: torch.Tensor | None


@dataclass(frozen=True)
class PackedChunks:
    """Chunks side by side, those that attend together next to each other.

    Attributes:
        token_ids: [tokens] int64.
        positions: [tokens] int64, where each goes in its slot.
        slots: [tokens] int64.
        groups: in the order of their tokens.
        wanted: places of the last tokens of prompts, in the order in which the chunks came.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    groups: tuple[ChunkGroup, ...]
    wanted: list[int]

    @classmethod
    def build(cls, chunks: Sequence[PromptChunk], first: int, device: torch.device) -> PackedChunks:
        """Pack chunks.

        Args:
            chunks: in any order.
            first: place in the pass of the first token.
            device: where the tensors go.
        """
        empty = torch.empty(0, dtype=torch.int64, device=device)
        if not chunks:
            return cls(empty, empty, empty, (), [])
        order = sorted(range(len(chunks)), key=lambda at: _kind(chunks[at]))
        ordered = [chunks[at] for at in order]
        groups, ends, at = list[ChunkGroup](), dict[int, int](), first
        for (start, slot, tokens), members in groupby(ordered, _kind):
            count, mask = len(list(members)), None
            if start:
                mask = torch.ones((tokens, start + tokens), dtype=torch.bool, device=device)
                mask = mask.tril(start)
            groups.append(ChunkGroup(at, count, tokens, start, slot, mask))
            for _ in range(count):
                at += tokens
                ends[order[len(ends)]] = at - 1
        lengths = torch.tensor([len(chunk.token_ids) for chunk in ordered])
        slots = torch.tensor([chunk.slot for chunk in ordered]).repeat_interleave(lengths)
        positions = torch.cat(
            [torch.arange(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in ordered]
        )
        return cls(
            torch.cat([chunk.token_ids for chunk in ordered]).to(device),
            positions.to(device),
            slots.to(device),
            tuple(groups),
            [ends[at] for at, chunk in enumerate(chunks) if chunk.is_last],
        )


class _Kind(NamedTuple):
    """Equal for chunks that attend together."""

    start: int
    slot: int
    tokens: int


def _kind(chunk: PromptChunk) -> _Kind:
    return _Kind(chunk.start, chunk.slot if chunk.start else 0, len(chunk.token_ids))
