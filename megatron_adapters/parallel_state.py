# pyright: standard, reportPrivateImportUsage=false
"""Megatron's global parallel state: set up from a layout, read back as a layout; only here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from chatlearn.errors import ChatLearnError
from chatlearn.parallel.layout import ParallelLayout, RankCoordinates
from megatron_adapters.patches import apply_patches

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "ParallelGroups",
    "initialize_parallel_state",
    "read_groups",
    "read_layout",
    "read_tracker",
    "restore_tracker",
]


@dataclass(frozen=True)
class ParallelGroups:
    """The process groups that the adapters use, and this rank's place in them."""

    tensor: "ProcessGroup"
    pipeline: "ProcessGroup"
    data: "ProcessGroup"
    data_with_context: "ProcessGroup"
    coordinates: RankCoordinates
    layout: ParallelLayout

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.coordinates.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the output layer."""
        return self.coordinates.pp_rank == self.layout.pp_size - 1


def initialize_parallel_state(layout: ParallelLayout, device: torch.device, seed: int) -> None:
    """Build Megatron's groups over the default process group, and seed its random trackers.

    Models that share a process (the `local` backend) share this state; then their layouts must be
    equal.

    Raises:
        ChatLearnError: another layout is set up in this process, or Megatron numbers its ranks
            differently than the layout does.
    """
    apply_patches(device)
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if mpu.is_initialized() and not _has_live_groups():
        # An earlier run of this process has closed its world.
        mpu.destroy_model_parallel()
    if not mpu.is_initialized():
        mpu.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp_size,
            pipeline_model_parallel_size=layout.pp_size,
            virtual_pipeline_model_parallel_size=layout.vpp_size if layout.vpp_size > 1 else None,
            context_parallel_size=layout.cp_size,
            expert_model_parallel_size=layout.ep_size,
            expert_tensor_parallel_size=layout.etp_size,
        )
        model_parallel_cuda_manual_seed(seed)
    found, expected = read_layout(), layout.coordinates(torch.distributed.get_rank())
    if (found.world_size, found.pp_size, found.tp_size) != (
        layout.world_size,
        layout.pp_size,
        layout.tp_size,
    ):
        raise ChatLearnError(f"this process is set up for the layout {found}, not for {layout}")
    at = read_groups(layout).coordinates
    if at != expected:
        raise ChatLearnError(f"Megatron places this rank at {at}, the layout at {expected}")


def _has_live_groups() -> bool:
    from megatron.core import parallel_state as mpu

    try:
        mpu.get_pipeline_model_parallel_rank()
    except ValueError:
        return False
    return True


def read_layout() -> ParallelLayout:
    """The layout that Megatron's global state describes."""
    from megatron.core import parallel_state as mpu

    return ParallelLayout(
        tp_size=mpu.get_tensor_model_parallel_world_size(),
        pp_size=mpu.get_pipeline_model_parallel_world_size(),
        dp_size=mpu.get_data_parallel_world_size(),
        cp_size=mpu.get_context_parallel_world_size(),
        ep_size=mpu.get_expert_model_parallel_world_size(),
        etp_size=mpu.get_expert_tensor_parallel_world_size(),
        vpp_size=mpu.get_virtual_pipeline_model_parallel_world_size() or 1,
    )


def read_groups(layout: ParallelLayout) -> ParallelGroups:
    """This rank's groups and coordinates, of Megatron's global state."""
    from megatron.core import parallel_state

    # Its getters are typed for other options, too.
    mpu: Any = parallel_state
    return ParallelGroups(
        tensor=mpu.get_tensor_model_parallel_group(),
        pipeline=mpu.get_pipeline_model_parallel_group(),
        data=mpu.get_data_parallel_group(),
        data_with_context=mpu.get_data_parallel_group(with_context_parallel=True),
        coordinates=RankCoordinates(
            mpu.get_tensor_model_parallel_rank(),
            mpu.get_context_parallel_rank(),
            mpu.get_data_parallel_rank(),
            mpu.get_pipeline_model_parallel_rank(),
        ),
        layout=layout,
    )


def read_tracker() -> dict[str, torch.Tensor]:
    """States of Megatron's random number tracker, by name."""
    return {name: state.clone() for name, state in _tracker().get_states().items()}


def restore_tracker(states: Mapping[str, torch.Tensor]) -> None:
    """Put back what `read_tracker` gave."""
    _tracker().set_states(dict(states))


def _tracker() -> Any:
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker()
