"""torch's Adam under Megatron's optimizers: one pass a step, and state that survives a checkpoint.

Seen in megatron-core 0.16.1 with torch's Adam (no Transformer Engine, no Apex):
- before the first step there is no state, which `state_dict()` needs: `allocate_state`;
- parameter states are copied key by key, and the step count is not among what is loaded:
  `apply` leaves it out;
- Megatron leaves torch's choice of code as it is, which on a CPU is a dozen passes over memory, and
  elsewhere several: `fuse_updates`;
- after a load all parameters share one `step` tensor, and Adam then counts it up once for every
  parameter, so training drifts in silence: `separate_steps`.
"""

import functools
from typing import Any

import torch

from megatron_adapters.patches.guard import expect_source

__all__ = ["allocate_state", "apply", "fuse_updates", "inner_optimizers", "separate_steps"]


def apply() -> None:
    """Let the distributed optimizer copy a parameter's state without its step count."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer: Any = DistributedOptimizer
    copy = optimizer._set_main_param_and_optimizer_states
    expect_source(copy, "for key in dst_tensors:", "adam_state")

    @functools.wraps(copy)
    def copy_without_step(self: Any, model_param: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        step = state.pop("step", None) if "step" not in tensors else None
        copy(self, model_param, tensors)
        if step is not None:
            state["step"] = step

    optimizer._set_main_param_and_optimizer_states = copy_without_step


def inner_optimizers(optimizer: Any) -> list[Any]:
    """Torch's optimizers within Megatron's; None for parts without parameters."""
    return [part.optimizer for part in getattr(optimizer, "chained_optimizers", [optimizer])]


def fuse_updates(optimizer: Any) -> None:
    """Let a torch Adam read and write each number once a step; call before its first step.

    Args:
        optimizer: any optimizer; nothing happens to other kinds.
    """
    if isinstance(optimizer, torch.optim.Adam):
        for group in optimizer.param_groups:
            group["fused"] = True


def allocate_state(optimizer: Any) -> None:
    """Give a torch Adam that has not stepped yet the state that its first step would make.

    Args:
        optimizer: any optimizer; nothing happens to other kinds.
    """
    if not isinstance(optimizer, torch.optim.Adam) or optimizer.state:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def separate_steps(optimizer: Any) -> None:
    """Give every parameter a `step` tensor of its own again, beside it; call after loading state.

    Args:
        optimizer: a torch optimizer.
    """
    for parameter, state in optimizer.state.items():
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            state["step"] = step.to(parameter.device, copy=True)
