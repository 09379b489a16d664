"""A fast digest of a tensor's bits that depends on where each of them stands."""

from __future__ import annotations

import hashlib
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["compute_digest", "has_equal_bits"]

_WIDTH = 512
_GOLDEN = 0x1E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


def compute_digest(values: torch.Tensor) -> int:
    """A 64-bit number of the bits of `values`, of any shape and dtype, in row-major order.

    The bytes are read as a table of 64-bit words, the last row filled up with zeros. The sums of
    all its rows and of all its columns, each mixed with its position, are added up and hashed
    together with the number of bytes. Words that changed or swapped places change a row's or a
    column's sum, and so the digest, up to coincidences of about 2 ** -64. It reads at about the
    speed of memory, and is no protection against somebody who wants to deceive it.
    """
    import torch

    # A single element may keep any stride, which stands in the way of another view.
    flat = values.detach().contiguous().as_strided((values.numel(),), (1,))
    raw = flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)
    row_bytes = 8 * _WIDTH
    num_whole = raw.numel() // row_bytes * row_bytes
    sums: list[int] = [raw.numel()]
    if num_whole:
        whole = raw[:num_whole]
        # Words must begin at a multiple of eight bytes, which a slice of a tensor may not do.
        whole = whole if whole.data_ptr() % 8 == 0 else whole.clone()
        table = whole.view(torch.int64).view(-1, _WIDTH)
        sums += [_mixed_sum(table.sum(0)), _mixed_sum(table.sum(1))]
    if num_whole < raw.numel():
        left = torch.zeros(-(-(raw.numel() - num_whole) // 8) * 8, dtype=torch.uint8)
        left = left.to(raw.device)
        left[: raw.numel() - num_whole] = raw[num_whole:]
        sums.append(_mixed_sum(left.view(torch.int64)))
    hashed = hashlib.blake2b(struct.pack(f"{len(sums)}q", *sums), digest_size=8)
    return int.from_bytes(hashed.digest(), "big")


def has_equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaN equals itself here."""
    import torch

    kind = getattr(torch, _INTEGERS[first.element_size()])
    return torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


def _mixed_sum(words: torch.Tensor) -> int:
    """The sum of words that are mixed with their places, by splitmix64's finaliser."""
    import torch

    places = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64)
    mixed = words + places * _GOLDEN
    mixed = (mixed ^ (mixed >> 30)) * _MIX_1
    mixed = (mixed ^ (mixed >> 27)) * _MIX_2
    return int((mixed ^ (mixed >> 31)).sum().item())
