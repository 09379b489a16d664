"""torch's Adam under Megatron's distributed optimizer: its state survives a checkpoint.

Seen in megatron-core 0.16.1 with torch's Adam (no Transformer Engine, no Apex):
- before the first step there is no state, which `state_dict()` needs: `allocate_state`;
- parameter states are copied key by key, and the step count is not among what is loaded:
  `apply` leaves it out;
- after a load all parameters share one `step` tensor, and Adam then counts it up once for every
  parameter, so training drifts in silence: `separate_steps`.
"""

import functools
from typing import Any

import torch

from megatron_adapters.patches.guard import expect_source

__all__ = ["allocate_state", "apply", "separate_steps"]


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
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def separate_steps(optimizer: Any) -> None:
    """Give every parameter a `step` tensor of its own again; call after loading state.

    Args:
        optimizer: a torch optimizer.
    """
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            state["step"] = step.clone()
