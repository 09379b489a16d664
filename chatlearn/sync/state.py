"""What the calls of a sync say, and what a rank keeps from one call to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatlearn.sync.copies import Copy, merge_pulls
from chatlearn.sync.programs import RankProgram
from chatlearn.sync.shared_memory import TensorHandle

if TYPE_CHECKING:
    import torch

__all__ = ["Early", "Offer", "Programs", "Shadow", "SyncCall"]


@dataclass(frozen=True)
class SyncCall:
    """One sync, as every rank is told.

    Attributes:
        key: of the sync; names what is kept in each context.
        version: number of the weights.
        is_full: all tensors; else those that training changes.
        is_double: receive beside the weights that are served.
        checks: `false`: digests of the blocks whose turn it is; `digest`: of all blocks; `full`:
            those and a second pass that compares every element.
        turn: how many syncs have succeeded: decides whose turn it is.
        is_on_cpu: all weights are in host memory, where digests are cheaper.
        is_check: this is that second pass.
    """

    key: str
    version: int
    is_full: bool = True
    is_double: bool = False
    checks: str = "false"
    turn: int = 0
    is_on_cpu: bool = False
    is_check: bool = False


@dataclass(frozen=True)
class Offer:
    """What one rank has to give in this sync.

    Attributes:
        index: its endpoint.
        label: how messages name it.
        version: how new the weights are, by what the rank itself has counted.
        handles: tensors that other processes may open.
        lent: tensors for models of the same process.
        digests: by number of the block.
        frozen: local names of a source's weights that training does not change now.
    """

    index: int
    label: str
    version: int
    handles: Mapping[str, TensorHandle]
    lent: Mapping[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    digests: Mapping[int, int] = field(default_factory=dict[int, int])
    frozen: frozenset[str] = field(default_factory=frozenset[str])


class Programs:
    """This rank's programs, and its tensors' shapes at the time; a resource of its context."""

    def __init__(
        self,
        full: RankProgram,
        trained: RankProgram | None,
        reserved_bytes: int,
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        self.full = full
        self.trained = trained
        self.reserved_bytes = reserved_bytes
        self.shapes = shapes
        self._full_copies = merge_pulls(full.pulls)
        self._trained_copies = merge_pulls(trained.pulls) if trained is not None else {}

    def of(self, call: SyncCall) -> RankProgram:
        """What this rank does in a sync."""
        return self.full if call.is_full or self.trained is None else self.trained

    def copies_of(self, call: SyncCall) -> Mapping[int, Sequence[Copy]]:
        """The pulls of a sync, by source, as few copies as they can be."""
        return self._full_copies if self.of(call) is self.full else self._trained_copies

    def close(self) -> None:
        """Nothing is held."""


class Early:
    """What `pull_early` copied, and by which handles; a resource of the context."""

    def __init__(self) -> None:
        self.call: SyncCall | None = None
        self.handles: dict[int, Mapping[str, TensorHandle]] = {}

    def has(self, call: SyncCall, offer: Offer) -> bool:
        """Whether the tensors of an offer were copied in this sync already."""
        return self.call == call and self.handles.get(offer.index) == offer.handles

    def close(self) -> None:
        """Forget it."""
        self.call = None
        self.handles = {}


class Shadow:
    """A second copy of the weights, in the mode `double`; a resource of the context.

    What no sync writes, such as rows that only pad a vocabulary, stays undefined in it. Names of
    one and the same tensor, such as tied weights, have one copy in common.
    """

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        import torch

        made: dict[tuple[object, ...], torch.Tensor] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        for name, tensor in live.items():
            place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place not in made:
                made[place] = torch.empty_like(tensor)
            self.tensors[name] = made[place]

    def close(self) -> None:
        """Forget it."""
        self.tensors.clear()
