"""Lanes: the ranks of one data-parallel copy, which are handed the same rows; who is free now.

Driver side. One pool serves every flow of a run, so that two flows that use one model, or two
models of one colocation group, take turns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatlearn.runtime.contract import WorkerGroup

__all__ = ["Lane", "LanePool", "build_lanes"]


@dataclass(frozen=True)
class Lane:
    """The ranks of one data-parallel copy of one replica.

    Attributes:
        group: the replica's workers.
        ranks: ranks that work on the lane's rows.
        output_rank: the one among them whose result counts.
        index: position among the model's lanes.
    """

    group: WorkerGroup
    ranks: tuple[int, ...]
    output_rank: int
    index: int

    @property
    def model_name(self) -> str:
        """Name of the model."""
        return self.group.model_name

    @property
    def label(self) -> str:
        """How the lane is called in timelines: model and index."""
        return f"{self.model_name}[{self.index}]"


def build_lanes(groups: Sequence[WorkerGroup]) -> tuple[Lane, ...]:
    """Lanes of one model: every data-parallel copy of every replica, in order."""
    lanes: list[Lane] = []
    for group in groups:
        for dp_rank in range(group.layout.dp_size):
            layout = group.layout
            ranks, output = layout.lane_ranks(dp_rank), layout.output_rank(dp_rank)
            lanes.append(Lane(group, ranks, output, len(lanes)))
    return tuple(lanes)


class LanePool:
    """Which lanes are free. A model whose colocation partner works has none free."""

    def __init__(
        self,
        groups: Mapping[str, Sequence[WorkerGroup]],
        colocation: Sequence[Sequence[str]] = (),
    ) -> None:
        self._lanes = {name: build_lanes(members) for name, members in groups.items()}
        self._busy: dict[str, set[int]] = {name: set() for name in groups}
        self._held: set[WorkerGroup] = set()
        self._partners: dict[str, tuple[str, ...]] = {
            name: tuple(n for group in colocation if name in group for n in group if n != name)
            for name in groups
        }

    def lanes(self, model_name: str) -> tuple[Lane, ...]:
        """All lanes of a model."""
        return self._lanes[model_name]

    def acquire(self, model_name: str) -> Lane | None:
        """A free lane of the model, now taken; None where there is none."""
        if self._is_blocked(model_name):
            return None
        busy = self._busy[model_name]
        for lane in self._lanes[model_name]:
            if lane.index not in busy and lane.group not in self._held:
                busy.add(lane.index)
                return lane
        return None

    def acquire_all(self, model_name: str) -> tuple[Lane, ...] | None:
        """Every lane of the model, now taken; None unless all of them are free."""
        if self._is_blocked(model_name) or self._busy[model_name]:
            return None
        self._busy[model_name].update(range(len(self._lanes[model_name])))
        return self._lanes[model_name]

    def hold(self, group: WorkerGroup) -> None:
        """Give out no lane of this group until `let_go`."""
        self._held.add(group)

    def let_go(self, group: WorkerGroup) -> None:
        """End what `hold` began."""
        self._held.discard(group)

    def release(self, lane: Lane) -> None:
        """Give a lane back."""
        self._busy[lane.model_name].discard(lane.index)

    def _is_blocked(self, model_name: str) -> bool:
        return any(self._busy.get(partner) for partner in self._partners[model_name])
