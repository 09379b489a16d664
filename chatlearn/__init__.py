"""Reinforcement learning from feedback on Megatron-Core models, from a laptop to many nodes."""

from chatlearn.engine import (
    DPOEngine,
    Engine,
    Environment,
    EvalEngine,
    Evaluator,
    GRPOEngine,
    OnlineDPOEngine,
    RLHFEngine,
    RunResult,
    Trainer,
    init,
)
from chatlearn.errors import ChatLearnError
from chatlearn.flow.trace import ControlDependencies
from chatlearn.models.base import BaseModule

__version__ = "0.1.0"

__all__ = [
    "BaseModule",
    "ChatLearnError",
    "ControlDependencies",
    "DPOEngine",
    "Engine",
    "Environment",
    "EvalEngine",
    "Evaluator",
    "GRPOEngine",
    "OnlineDPOEngine",
    "RLHFEngine",
    "RunResult",
    "Trainer",
    "__version__",
    "init",
]
