"""Megatron-Core on any device, and the ready-made models of RLHF.

Importing this package loads neither torch nor Megatron; a module's name loads it when it is asked
for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_adapters.modules.base import MegatronModule
    from megatron_adapters.modules.inference import (
        PolicyInference,
        PolicyReference,
        RewardInference,
        ValueInference,
    )
    from megatron_adapters.modules.policy_trainer import PolicyTrainer
    from megatron_adapters.modules.reward_trainer import RewardTrainer
    from megatron_adapters.modules.value_trainer import ValueTrainer

__all__ = [
    "MegatronModule",
    "PolicyInference",
    "PolicyReference",
    "PolicyTrainer",
    "RewardInference",
    "RewardTrainer",
    "ValueInference",
    "ValueTrainer",
]

_HOME = {
    "MegatronModule": "base",
    "PolicyInference": "inference",
    "PolicyReference": "inference",
    "RewardInference": "inference",
    "ValueInference": "inference",
    "PolicyTrainer": "policy_trainer",
    "RewardTrainer": "reward_trainer",
    "ValueTrainer": "value_trainer",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"megatron_adapters.modules.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
