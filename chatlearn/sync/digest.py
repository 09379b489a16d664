"""Fast digests of tensors' bits that depend on where each of them stands."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["compute_digest", "compute_digests", "has_equal_bits"]

_WIDTH = 512
_GOLDEN = 0x1E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_AT_ONCE = 64


def compute_digest(values: torch.Tensor) -> int:
    """The digest of one tensor; see `compute_digests`."""
    return compute_digests([values])[0]


def compute_digests(tensors: Iterable[torch.Tensor]) -> list[int]:
    """For each tensor, of any shape and dtype, a 64-bit number of its bits in row-major order.

    The bytes are read as a table of 64-bit words. The sums of all its columns and of all its rows,
    and the words that fill no row, are each mixed with their place, added up, and hashed together
    with the number of bytes. Words that changed or swapped places change a row's or a column's
    sum, and so the digest, up to coincidences of about 2 ** -64. It reads at about the speed of
    memory, and is no protection against somebody who wants to deceive it. What is mixed is small
    beside what is read, so it is mixed for many tensors at once.
    """
    found: list[int] = []
    left = iter(tensors)
    while chunk := list(islice(left, _AT_ONCE)):
        sums = [_sum_up(values) for values in chunk]
        for values, total in zip(chunk, _mix(sums), strict=True):
            size = values.numel() * values.element_size()
            hashed = hashlib.blake2b(struct.pack("2q", size, total), digest_size=8)
            found.append(int.from_bytes(hashed.digest(), "big"))
    return found


def has_equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaN equals itself here."""
    import torch

    kind = getattr(torch, _INTEGERS[first.element_size()])
    return torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


def _sum_up(values: torch.Tensor) -> torch.Tensor:
    """Column sums, row sums and the words of the last, unfinished row, as one vector of int64."""
    import torch

    # A single element may keep any stride, which stands in the way of another view.
    flat = values.detach().contiguous().as_strided((values.numel(),), (1,))
    raw = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    num_whole = raw.numel() // (8 * _WIDTH) * (8 * _WIDTH)
    parts: list[torch.Tensor] = []
    if num_whole:
        whole = raw[:num_whole]
        # Words must begin at a multiple of eight bytes, which a slice of a tensor may not do.
        whole = whole if whole.data_ptr() % 8 == 0 else whole.clone()
        table = whole.view(torch.int64).view(-1, _WIDTH)
        parts += [table.sum(0), table.sum(1)]
    rest = raw.numel() - num_whole
    if rest:
        words = torch.zeros(-(-rest // 8) * 8, dtype=torch.uint8, device=raw.device)
        words[:rest] = raw[num_whole:]
        parts.append(words.view(torch.int64))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=raw.device)


def _mix(sums: Sequence[torch.Tensor]) -> list[int]:
    """For each vector the sum of its words, mixed with their places by splitmix64's finaliser."""
    import torch

    lengths = torch.tensor([len(each) for each in sums])
    mixed = torch.cat([each.cpu() for each in sums])
    places = torch.cat([torch.arange(1, len(each) + 1) for each in sums])
    mixed = mixed + places * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    mixed = mixed ^ (mixed >> 31)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    running = torch.cat([torch.zeros(1, dtype=torch.int64), mixed.cumsum(0)])
    totals = running[ends[1:]] - running[ends[:-1]]
    return [int(total) for total in totals]
