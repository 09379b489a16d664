"""A fast digest of a tensor's bits that depends on where each of them stands."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["compute_digest", "has_equal_bits"]

_WIDTH = 2048
_ODD = 0x1E3779B97F4A7C15


def compute_digest(values: torch.Tensor) -> int:
    """A 64-bit number of the bits of `values`, of any shape and dtype, in row-major order.

    The bytes are read as 64-bit words in rows of 2,048; the sums of all rows and of all columns
    are weighted by position. Words that changed, moved or swapped places change it, except for
    coincidences of about 2 ** -64. It reads at about the speed of memory, and is no protection
    against somebody who wants to deceive it.
    """
    import torch

    raw = values.detach().contiguous().reshape(-1).view(torch.uint8)
    num_words = raw.numel() // 8
    # Words must begin at a multiple of eight bytes, which a slice of a tensor may not do.
    aligned = raw if raw.storage_offset() % 8 == 0 else raw.clone()
    words = aligned[: num_words * 8].view(torch.int64)
    num_rows = num_words // _WIDTH
    table = words[: num_rows * _WIDTH].view(num_rows, _WIDTH)
    rest = torch.cat([words[num_rows * _WIDTH :], aligned[num_words * 8 :].to(torch.int64)])
    total = _weigh(table.sum(0), 1) + _weigh(table.sum(1), 2) + _weigh(rest, 3)
    return int(total.item()) ^ raw.numel()


def has_equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaN equals itself here."""
    import torch

    # Bits are compared as integers of the same width, which all dtypes can be viewed as.
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[first.element_size()]
    return torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


def _weigh(words: torch.Tensor, salt: int) -> torch.Tensor:
    import torch

    places = torch.arange(1, words.numel() + 1, device=words.device, dtype=torch.int64)
    return (words * ((places * 2 + 1) * _ODD + salt)).sum()
