# pyright: standard, reportPrivateImportUsage=false
"""Megatron's random number tracker works on the CPU's generator where there is no CUDA.

Seen in megatron-core 0.16.1: `megatron.core.tensor_parallel.random` reads and writes the state of
the CUDA generator.
"""

from typing import Any

import torch

from megatron_adapters.patches.guard import expect_source

__all__ = ["apply"]


def apply() -> None:
    """Replace the two functions that read and write the generator's state."""
    from megatron.core.tensor_parallel import random

    expect_source(random._get_cuda_rng_state, "torch.cuda.random.get_rng_state", "cpu_random")
    expect_source(random._set_cuda_rng_state, "_lazy_call(cb)", "cpu_random")
    random._get_cuda_rng_state = _get_state
    random._set_cuda_rng_state = _set_state


def _get_state(device: Any = "cpu", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    del device, clone, graph_safe
    return torch.get_rng_state()


def _set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    del device, graph_safe
    torch.set_rng_state(new_state)
