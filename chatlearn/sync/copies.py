"""Copies out of another rank's tensors, as few and as large as they can be.

A plan moves buckets of bounded size, so it cuts large tensors to parts, and tensors that lie in
one (the two halves of a gated MLP) are parts from the start. Who copies straight from tensor to
tensor has no use for that: where parts lie side by side on both sides, they are copied as one.

What is made here is kept from one sync to the next. It holds numbers and names alone: tensors, and
the memory that they are in, are looked up anew each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from chatlearn.sync.programs import Part, Pull

if TYPE_CHECKING:
    import torch

__all__ = ["Copy", "Region", "merge_pulls", "run_copies"]

_Slices = tuple[slice, ...]
_Pair = tuple[_Slices, _Slices]


class Region(NamedTuple):
    """A box of a local tensor.

    Attributes:
        local_name: of the tensor.
        slices: into it.
        whole_shape: shape of a tensor that the slices cover; None where there is none.
    """

    local_name: str
    slices: tuple[slice, ...]
    whole_shape: tuple[int, ...] | None

    def find(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The region, as a view of its tensor; the tensor itself where that is all of it."""
        tensor = tensors[self.local_name]
        return tensor if tensor.shape == self.whole_shape else tensor[self.slices]


class Copy(NamedTuple):
    """Two regions with the same elements; of the shapes only leading ones may differ."""

    given: Region
    taken: Region


def merge_pulls(pulls: Iterable[Pull]) -> dict[int, tuple[Copy, ...]]:
    """What is to be copied, by source."""
    merged: dict[tuple[int, str, str], list[_Pair]] = {}
    for pull in pulls:
        for given, taken in zip(pull.source_parts, pull.parts, strict=True):
            kind = (pull.source, given.local_name, taken.local_name)
            _add(merged.setdefault(kind, []), given, taken)
    found: dict[int, list[Copy]] = {}
    for (source, given_name, taken_name), pairs in merged.items():
        found.setdefault(source, []).extend(
            Copy(_region(given_name, given), _region(taken_name, taken)) for given, taken in pairs
        )
    return {source: tuple(copies) for source, copies in found.items()}


def run_copies(
    copies: Sequence[Copy],
    tensors: Mapping[str, torch.Tensor],
    targets: Mapping[str, torch.Tensor],
) -> None:
    """Copy out of one rank's tensors; values are rounded to the dtypes of the targets."""
    for given, taken in copies:
        source, target = given.find(tensors), taken.find(targets)
        target.copy_(source if source.shape == target.shape else source.view(target.shape))


def _add(pairs: list[_Pair], given: Part, taken: Part) -> None:
    """Add two regions behind others, and merge from the end as long as that is possible.

    More than once: a tensor that is cut along two axes has its rows put together from parts, then
    itself from rows.
    """
    last = (given.slices, taken.slices)
    while pairs and (joined := _join(pairs[-1], last)) is not None:
        pairs.pop()
        last = joined
    pairs.append(last)


def _join(first: _Pair, second: _Pair) -> _Pair | None:
    """Both as one, where the second continues the first along the same axis on both sides."""
    axes = [_find_axis(before, behind) for before, behind in zip(first, second, strict=True)]
    # Counted from the end: at the start either side may have more axes, which have length 1.
    if axes[0] is None or axes[0] != axes[1]:
        return None
    given, taken = (
        _extend(before, behind, axes[0]) for before, behind in zip(first, second, strict=True)
    )
    return given, taken


def _find_axis(first: _Slices, second: _Slices) -> int | None:
    """The one axis, from the end, along which the second box begins where the first one ends."""
    others = [at - len(first) for at, each in enumerate(first) if each != second[at]]
    if len(others) != 1 or first[others[0]].stop != second[others[0]].start:
        return None
    return others[0]


def _extend(first: _Slices, second: _Slices, axis: int) -> _Slices:
    at = len(first) + axis
    return (*first[:at], slice(first[at].start, second[at].stop), *first[at + 1 :])


def _region(local_name: str, slices: _Slices) -> Region:
    is_from_start = all(each.start == 0 for each in slices)
    return Region(
        local_name, slices, tuple(each.stop for each in slices) if is_from_start else None
    )
