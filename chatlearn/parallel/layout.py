"""The parallel layout of one replica as a frozen record: rank <-> coordinates.

Pure: no torch, no process group. The order of the axes, fastest first, is Megatron-Core's
default `tp-cp-ep-dp-pp`.
"""

from dataclasses import dataclass

from chatlearn.errors import ConfigError

__all__ = ["ParallelLayout", "RankCoordinates"]


@dataclass(frozen=True)
class RankCoordinates:
    """Where one rank stands on each axis of its replica's layout."""

    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel axes of one replica (one process world).

    `dp_size` counts data-parallel copies without context parallelism. Experts are spread over
    the (cp, dp) ranks: `ep_size * etp_size` must divide `tp_size * cp_size * dp_size`.
    """

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    cp_size: int = 1
    ep_size: int = 1
    etp_size: int | None = None
    vpp_size: int = 1

    def __post_init__(self) -> None:
        sizes = (self.tp_size, self.pp_size, self.dp_size, self.cp_size, self.ep_size)
        if min(*sizes, self.vpp_size) < 1:
            raise ConfigError(f"every size of a layout is 1 or more, got {self}")

    @property
    def world_size(self) -> int:
        """Number of ranks of the replica."""
        return self.tp_size * self.cp_size * self.dp_size * self.pp_size

    def coordinates(self, rank: int) -> RankCoordinates:
        """Coordinates of `rank` (0 <= rank < world_size)."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the layout's {self.world_size} ranks")
        tp_rank, rest = rank % self.tp_size, rank // self.tp_size
        cp_rank, rest = rest % self.cp_size, rest // self.cp_size
        return RankCoordinates(tp_rank, cp_rank, rest % self.dp_size, rest // self.dp_size)

    def rank_of(self, at: RankCoordinates) -> int:
        """Rank at the given coordinates; the inverse of `coordinates`."""
        row = at.dp_rank + self.dp_size * at.pp_rank
        return at.tp_rank + self.tp_size * (at.cp_rank + self.cp_size * row)

    def lane_ranks(self, dp_rank: int) -> tuple[int, ...]:
        """Ranks that work on the same rows: all those of one data-parallel copy."""
        return tuple(r for r in range(self.world_size) if self.coordinates(r).dp_rank == dp_rank)

    def output_rank(self, dp_rank: int) -> int:
        """The rank whose result counts for a lane: first tp and cp rank, last pipeline stage."""
        return self.rank_of(RankCoordinates(0, 0, dp_rank, self.pp_size - 1))

    def data_parallel_ranks(self, rank: int) -> tuple[int, ...]:
        """Ranks that hold the same model shard as `rank`, itself included."""
        at = self.coordinates(rank)
        return tuple(
            self.rank_of(RankCoordinates(at.tp_rank, at.cp_rank, dp_rank, at.pp_rank))
            for dp_rank in range(self.dp_size)
        )
