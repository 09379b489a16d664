"""Fast digests of tensors' bits that depend on where each of them stands."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import torch

__all__ = ["compute_digest", "compute_digests", "has_equal_bits", "hash_tensors"]

# Words of 32 bits in a row, and rows of a panel: 4 KiB and 8 MiB.
_WIDTH = 1024
_PANEL_ROWS = 2048
_PANEL_BYTES = 4 * _WIDTH * _PANEL_ROWS
# Rows that are worked on at once: half a megabyte, which a cache holds. On a GPU few large steps
# are faster than many small ones.
_ROWS_AT_ONCE = 128
# The upper half of a word is added so many times to the lower one. Odd, so that no bit of it is
# lost; more than one, so that halves that swap places count; and small enough that of two words
# with one result one holds a NaN.
_FOLD = 107
_GOLDEN = 0x1E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}
_AT_ONCE = 64
# On a GPU, where a small step costs its launch alone, so much is summed up at once.
_STACK_BYTES = 128 << 20


def compute_digest(values: torch.Tensor) -> int:
    """The digest of one tensor; see `compute_digests`."""
    return compute_digests([values])[0]


def compute_digests(
    tensors: Iterable[torch.Tensor], *, is_stacked: bool | None = None
) -> list[int]:
    """For each tensor, of any shape and dtype, a 64-bit number of its bits in row-major order.

    The bytes are read as panels of 32-bit words, `[2048, 1024]` at most. Each word's upper half is
    added to its lower half, so that its highest bits count in full; the word is multiplied by a
    number of its row, odd and like no other row's; and the columns are summed, all modulo 2 ** 32.
    The sums, and the words that fill no row, are mixed with their places, added up, and hashed
    together with the number of bytes.

    So each word counts by its panel, its row and its column. A word that changes alone always
    changes the digest (of two words that fold to one, one holds a NaN). So does any other change,
    permutations included, up to coincidences: about 2 ** -32 at large, 2 ** -17 at worst, where
    only the highest bits of some words of one column trade places; where there are two of them, it
    always does. It reads at about the speed of memory, and is no protection against somebody who
    wants to deceive it.

    On the CPU the last mixing is done for many tensors at once. Only their sums are kept for it:
    where `tensors` makes them one by one, no more than two are alive at a time.

    On a GPU tensors of up to a panel are summed up together where they have one dtype and shape.
    They wait until there are 128 MiB of them; they and their copies take about 256 MiB at most.
    Only their totals are kept, and come to the host all at once, at the end.

    Args:
        tensors: all on one device.
        is_stacked: whether they are summed up together; None: on a GPU. The digests are the same.
    """
    left = iter(tensors)
    first = list(islice(left, 1))
    if is_stacked is None:
        is_stacked = bool(first) and first[0].is_cuda
    every = _put_before(first, left)
    return [_hash(*each) for each in (_add_stacks if is_stacked else _add_each)(every)]


def hash_tensors(tensors: Iterable[torch.Tensor]) -> list[int]:
    """As `compute_digests`, other numbers and a sixth of the time, for tensors on the CPU alone.

    XXH3 of the bytes in row-major order. Where `tensors` makes them one by one, no more than two
    are alive at a time.
    """
    import xxhash

    return [xxhash.xxh3_64_intdigest(cast("Any", _flatten(values)).numpy()) for values in tensors]


def has_equal_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; NaN equals itself here."""
    import torch

    kind = getattr(torch, _INTEGERS[first.element_size()])
    return torch.equal(first.contiguous().view(kind), second.contiguous().view(kind))


def _put_before(first: list[torch.Tensor], left: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    while first:
        yield first.pop()
    yield from left


def _hash(size: int, total: int) -> int:
    hashed = hashlib.blake2b(struct.pack("2q", size, total), digest_size=8)
    return int.from_bytes(hashed.digest(), "big")


def _add_each(tensors: Iterator[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """Number of bytes and total of each tensor."""
    while chunk := [_sum_up(values) for values in islice(tensors, _AT_ONCE)]:
        totals = _add_up([sums for _, sums in chunk])
        yield from zip((size for size, _ in chunk), totals, strict=True)


def _add_stacks(tensors: Iterator[torch.Tensor]) -> list[tuple[int, int]]:
    """As `_add_each`, where few large steps are faster than many small ones."""
    import torch

    sizes: list[int] = []
    order: list[int] = []
    totals: list[torch.Tensor] = []
    waiting: dict[tuple[torch.dtype, torch.Size], dict[int, torch.Tensor]] = {}
    num_bytes = 0
    for place, values in enumerate(tensors):
        sizes.append(values.nbytes)
        if not 0 < values.nbytes <= _PANEL_BYTES:
            order.append(place)
            totals.append(_add_rows(_sum_up(values)[1][None]))
            continue
        waiting.setdefault((values.dtype, values.shape), {})[place] = values
        num_bytes += values.nbytes
        if num_bytes >= _STACK_BYTES:
            _work_off(waiting, order, totals)
            num_bytes = 0
    _work_off(waiting, order, totals)
    # Each transfer waits for all work before it.
    found = torch.cat(totals).cpu() if totals else ()
    by_place = {place: int(total) for place, total in zip(order, found, strict=True)}
    return [(size, by_place[place]) for place, size in enumerate(sizes)]


def _work_off(
    waiting: dict[Any, dict[int, torch.Tensor]], order: list[int], totals: list[torch.Tensor]
) -> None:
    """Add up all that waits, which is let go; gives places to `order`, results to `totals`."""
    while waiting:
        _, blocks = waiting.popitem()
        order.extend(blocks)
        totals.append(_add_rows(_sum_stack(blocks)))


def _sum_stack(blocks: dict[int, torch.Tensor]) -> torch.Tensor:
    """For each block, of one dtype and shape, a row of what `_sum_up` gives; lets go of them."""
    import torch

    raw = torch.stack(tuple(blocks.values())).detach().reshape(len(blocks), -1).view(torch.uint8)
    # Before more memory is taken.
    blocks.clear()
    size = raw.shape[1]
    num_whole = size // (4 * _WIDTH) * (4 * _WIDTH)
    if size % 8:
        raw = torch.nn.functional.pad(raw, (0, -size % 8))
    parts: list[torch.Tensor] = []
    if num_whole:
        table = raw[:, :num_whole].view(torch.int32).view(len(raw), -1, _WIDTH)
        weights = _factors(raw.device)[: table.shape[1]]
        parts.append(_weigh(table, weights, torch.empty_like(table)).view(torch.int64))
    if size > num_whole:
        parts.append(raw[:, num_whole:].view(torch.int64))
    return torch.cat(parts, 1)


def _add_rows(sums: torch.Tensor) -> torch.Tensor:
    """As `_add_up` does it, for each row, where it lies."""
    import torch

    places = torch.arange(1, sums.shape[1] + 1, device=sums.device)
    return _mix(sums + places * _GOLDEN).sum(1)


def _sum_up(values: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Number of bytes; column sums of all panels and the words that fill no row, as int64."""
    import torch

    raw = _flatten(values)
    num_whole = raw.numel() // (4 * _WIDTH) * (4 * _WIDTH)
    parts: list[torch.Tensor] = []
    if num_whole:
        whole = raw[:num_whole]
        # Words must begin at a multiple of four bytes, which a slice of a tensor may not do.
        whole = whole if whole.data_ptr() % 4 == 0 else whole.clone()
        table = whole.view(torch.int32).view(-1, _WIDTH)
        parts.extend(_sum_columns(panel).view(torch.int64) for panel in _split(table, _PANEL_ROWS))
    rest = raw.numel() - num_whole
    if rest:
        words = torch.zeros(-(-rest // 8) * 8, dtype=torch.uint8, device=raw.device)
        words[:rest] = raw[num_whole:]
        parts.append(words.view(torch.int64))
    if not parts:
        parts.append(torch.zeros(0, dtype=torch.int64, device=raw.device))
    return raw.numel(), torch.cat(parts) if len(parts) > 1 else parts[0]


def _flatten(values: torch.Tensor) -> torch.Tensor:
    """The bytes in row-major order; a view where they lie so."""
    import torch

    # A single element may keep any stride, which stands in the way of another view.
    flat = values.detach().contiguous().as_strided((values.numel(),), (1,))
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def _sum_columns(panel: torch.Tensor) -> torch.Tensor:
    """Column sums of words that were folded and multiplied by their row's number, int32."""
    import torch

    at_once = _PANEL_ROWS if panel.is_cuda else _ROWS_AT_ONCE
    factors = _factors(panel.device)[: len(panel)]
    space = torch.empty_like(panel[:at_once])
    # The last rows may be fewer; what is made for the first ones is used again.
    found = [
        _weigh(rows, weights, space[: len(rows)])
        for rows, weights in zip(_split(panel, at_once), _split(factors, at_once), strict=True)
    ]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0, dtype=torch.int32)


def _weigh(rows: torch.Tensor, weights: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
    """Column sums of `[..., rows, words]`, folded and multiplied in memory of the same shape."""
    import torch

    words = torch.bitwise_right_shift(rows, 16, out=space)
    torch.add(rows, words, alpha=_FOLD, out=words)
    return words.mul_(weights).sum(-2, dtype=torch.int32)


def _split(table: torch.Tensor, num_rows: int) -> list[torch.Tensor]:
    """So many rows at a time; the last ones may be fewer."""
    return [table[start : start + num_rows] for start in range(0, len(table), num_rows)]


@cache
def _factors(device: torch.device) -> torch.Tensor:
    """`[2048, 1]`, int32: for each row of a panel a random odd number.

    Their lowest 12 bits are a permutation, so that two of them differ there already.
    """
    import torch

    random = _mix(torch.arange(1, _PANEL_ROWS + 1) * _GOLDEN)
    words = (random << 12) | (2 * random.argsort() + 1)
    return words.view(torch.int32)[::2].clone()[:, None].to(device)


def _add_up(sums: Sequence[torch.Tensor]) -> list[int]:
    """For each vector the sum of its words, each mixed with its place."""
    import torch

    lengths = torch.tensor([len(each) for each in sums])
    places = torch.cat([torch.arange(1, len(each) + 1) for each in sums])
    # From a GPU they come here all at once: each transfer waits for all work before it.
    mixed = _mix(torch.cat(list(sums)).cpu() + places * _GOLDEN)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    running = torch.cat([torch.zeros(1, dtype=torch.int64), mixed.cumsum(0)])
    totals = running[ends[1:]] - running[ends[:-1]]
    return [int(total) for total in totals]


def _mix(words: torch.Tensor) -> torch.Tensor:
    """The words after splitmix64's finaliser, which maps no two of them to one."""
    words = (words ^ _shift(words, 30)) * _MIX_1
    words = (words ^ _shift(words, 27)) * _MIX_2
    return words ^ _shift(words, 31)


def _shift(words: torch.Tensor, count: int) -> torch.Tensor:
    """To the right, without a copy of the sign."""
    return (words >> count) & ((1 << (64 - count)) - 1)
