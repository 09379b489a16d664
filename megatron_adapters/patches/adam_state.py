"""torch's Adam under Megatron's distributed optimizer: its step count survives a checkpoint.

Seen in megatron-core 0.16.1 with torch's Adam (no Transformer Engine, no Apex): after a load all
parameters share one `step` tensor, and Adam then counts it up once for every parameter, so training
drifts in silence.
"""

from typing import Any

import torch

__all__ = ["separate_steps"]


def separate_steps(optimizer: Any) -> None:
    """Give every parameter a `step` tensor of its own again; call after loading state.

    Args:
        optimizer: a torch optimizer.
    """
    for state in optimizer.state.values():
        step = state.get("step")
        if isinstance(step, torch.Tensor):
            state["step"] = step.clone()
