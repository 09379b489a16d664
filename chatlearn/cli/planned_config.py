"""What a model's config says, and what its workers will take where it leaves that open."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chatlearn.config import Config, ModelConfig
    from chatlearn.engine.planning import RunPlan

__all__ = ["planned_config"]


def planned_config(plan: RunPlan, config: Config, model_name: str) -> ModelConfig:
    """A model's config as its workers will take it on the devices of the plan."""
    own = config.model(model_name)
    # Only Megatron modules have a precision to decide on.
    decide = getattr(plan.flows.modules[model_name], "decide_precision", None)
    if decide is None:
        return own
    request = next(each for each in plan.requests if each.model_name == model_name)
    is_on_gpu = plan.placement.device_kind == "gpu" and not request.is_cpu_only
    return decide(own, "cuda" if is_on_gpu else "cpu")
