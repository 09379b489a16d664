"""Engine, Environment, Trainer, Evaluator and the built-in engines."""

from chatlearn.engine.builtin import (
    DPOEngine,
    EvalEngine,
    GRPOEngine,
    OnlineDPOEngine,
    RLHFEngine,
)
from chatlearn.engine.components import Environment, Evaluator, Trainer
from chatlearn.engine.engine import Engine
from chatlearn.engine.result import RunResult
from chatlearn.engine.state import init

__all__ = [
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
    "init",
]
