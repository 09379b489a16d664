"""Which prompts an episode draws: deterministic, without repeats within an epoch. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chatlearn.data.rows import RowId
from chatlearn.errors import DataError

__all__ = ["DrawnPrompt", "PromptSampler", "SamplerState", "expand_samples"]


@dataclass(frozen=True)
class DrawnPrompt:
    """One prompt drawn: its running number, and where it lies."""

    number: int
    dataset_index: int
    index: int


@dataclass(frozen=True)
class SamplerState:
    """Where a sampler stands: prompts drawn in all and from each data set."""

    num_drawn: int
    positions: tuple[int, ...]


class PromptSampler:
    """Draws prompts from one data set, or from several mixed by ratio.

    Each data set is gone through epoch by epoch; an episode runs on into the next epoch's
    shuffle. Mixing follows the ratio over the whole run, not within each episode.

    Args:
        lengths: number of prompts of each data set.
        ratio: how often each data set is drawn from, relative to the others.
        shuffle: shuffle every epoch anew.
        seed: of the shuffles.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        ratio: Sequence[int] | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        if not lengths or min(lengths) < 1:
            raise DataError(f"every data set needs at least one prompt, got lengths {lengths}")
        self._ratio = tuple(ratio) if ratio is not None else tuple(lengths)
        if len(self._ratio) != len(lengths):
            raise DataError(
                f"runtime.data_ratio has {len(self._ratio)} numbers for {len(lengths)} data sets"
            )
        self._lengths = tuple(lengths)
        self._shuffle = shuffle
        self._seed = seed
        self._positions = [0] * len(lengths)
        self._num_drawn = 0
        self._orders: dict[int, tuple[int, list[int]]] = {}

    @property
    def state(self) -> SamplerState:
        """Where the sampler stands; `restore` takes it back."""
        return SamplerState(self._num_drawn, tuple(self._positions))

    def restore(self, state: SamplerState) -> None:
        """Go on from `state`."""
        if len(state.positions) != len(self._lengths):
            raise DataError(
                f"the saved position is of {len(state.positions)} data sets, there are "
                f"{len(self._lengths)}"
            )
        self._num_drawn = state.num_drawn
        self._positions = list(state.positions)

    def draw(self, count: int) -> list[DrawnPrompt]:
        """The next `count` prompts."""
        return [self._draw_one() for _ in range(count)]

    def _draw_one(self) -> DrawnPrompt:
        dataset = self._next_dataset()
        position = self._positions[dataset]
        epoch, within = divmod(position, self._lengths[dataset])
        index = self._order(dataset, epoch)[within]
        drawn = DrawnPrompt(self._num_drawn, dataset, index)
        self._positions[dataset] += 1
        self._num_drawn += 1
        return drawn

    def _next_dataset(self) -> int:
        """The data set that is furthest behind its share."""
        return min(
            range(len(self._lengths)),
            key=lambda at: ((self._positions[at] + 1) / self._ratio[at], at),
        )

    def _order(self, dataset: int, epoch: int) -> list[int]:
        known = self._orders.get(dataset)
        if known is None or known[0] != epoch:
            order = list(range(self._lengths[dataset]))
            if self._shuffle:
                random.Random(f"{self._seed}/{dataset}/{epoch}").shuffle(order)
            known = (epoch, order)
            self._orders[dataset] = known
        return known[1]


def expand_samples(
    prompts: Sequence[DrawnPrompt], num_samples_per_prompt: int
) -> list[tuple[RowId, DrawnPrompt]]:
    """Each prompt as often as it is sampled, samples of one prompt side by side."""
    return [
        (RowId(prompt.number, sample), prompt)
        for prompt in prompts
        for sample in range(num_samples_per_prompt)
    ]
