"""Faults of a user's own module: its weights, and what its ranks tell each other. Worker side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from chatlearn.models.faults import SEVERITY, NumericFault

if TYPE_CHECKING:
    from chatlearn.config.guards import GuardsConfig
    from chatlearn.parallel.context import WorkerContext

__all__ = ["agree_on_fault", "find_weight_fault", "largest"]


def find_weight_fault(guards: GuardsConfig, model: Any) -> NumericFault | None:
    """Whether a weight of a torch module is not finite, to the precision of a sum.

    Args:
        guards: the limits; with `not_finite: warn` nothing is looked at.
        model: a torch module, or anything else, which has no weights.
    """
    import torch

    if guards.not_finite == "warn" or not isinstance(model, torch.nn.Module):
        return None
    sums = {
        name: parameter.detach().sum(dtype=torch.float32)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.is_floating_point()
    }
    if not sums or bool(torch.isfinite(torch.stack([s.cpu() for s in sums.values()])).all()):
        return None
    name = next(name for name, total in sums.items() if not bool(torch.isfinite(total)))
    text = (
        f"weight {name} is not finite after the update: lower the learning rate, and go on from "
        "the last checkpoint"
    )
    return NumericFault("weights", float("nan"), "stop", text)


def agree_on_fault(context: WorkerContext, own: NumericFault | None) -> NumericFault | None:
    """The gravest fault of any rank of the replica, the same on all; each rank calls it."""
    worst = largest(context, 0.0 if own is None else SEVERITY[own.action])
    if worst == 0.0 or not _has_world(context):
        return own
    import torch.distributed

    distributed: Any = torch.distributed
    found: list[Any] = [None] * context.layout.world_size
    distributed.all_gather_object(found, own)
    faults = cast("list[NumericFault | None]", found)
    return next(f for f in faults if f is not None and SEVERITY[f.action] == worst)


def largest(context: WorkerContext, number: float) -> float:
    """The largest of a number that each rank of the replica has."""
    if not _has_world(context):
        return number
    import torch
    import torch.distributed

    distributed: Any = torch.distributed
    found = torch.tensor([number], dtype=torch.float64, device=context.device)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    return float(found.item())


def _has_world(context: WorkerContext) -> bool:
    """Whether there are other ranks, in a process world of their own."""
    import torch.distributed

    return context.layout.world_size > 1 and torch.distributed.is_initialized()
