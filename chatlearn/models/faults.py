"""Numbers of a training step that went wrong, by the limits of the config. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatlearn.config.guards import Action, GuardsConfig

__all__ = ["SEVERITY", "NumericFault", "find_fault", "find_reward_fault"]

_LIMITED = ("kl", "update_kl", "ratio_gap", "logprob_gap", "grad_norm")
SEVERITY = {"warn": 1, "skip": 2, "stop": 3}
_HINTS = {
    "kl": "raise kl_coef, or lower the learning rate",
    "update_kl": "lower the learning rate, or make fewer updates of an episode",
    "ratio_gap": "lower the learning rate, or make fewer updates of an episode",
    "logprob_gap": "sampler and trainer compute different numbers: compare their precision, or set "
    "runtime.algorithm.rollout_correction",
    "grad_norm": "lower the learning rate, or look for extreme rows",
}


@dataclass(frozen=True)
class NumericFault:
    """A number beyond its limit.

    Attributes:
        name: of the number.
        value: what it is.
        action: what the config wants done.
        text: for a person.
    """

    name: str
    value: float
    action: Action
    text: str


def find_fault(guards: GuardsConfig, numbers: Mapping[str, float]) -> NumericFault | None:
    """The gravest fault among a step's numbers; None where all is well.

    Args:
        guards: the limits.
        numbers: by name; those that end in `loss`, and `grad_norm`, have to be finite.
    """
    faults: list[NumericFault] = []
    for name, value in numbers.items():
        is_guarded = name.lower().endswith("loss") or name.lower() == "grad_norm"
        if is_guarded and not math.isfinite(value):
            text = (
                f"the {name.replace('grad_norm', 'gradient norm')} is {value}: lower the learning "
                "rate, or look for rows with extreme rewards or log-probabilities"
            )
            faults.append(NumericFault(name, value, guards.not_finite, text))
    for name in _LIMITED:
        limit: float | None = getattr(guards, f"{name}_limit")
        value = numbers.get(name)
        if limit is None or value is None or value <= limit:
            continue
        action: Action = getattr(guards, f"{name}_action")
        text = f"{name} is {value:.4g}, above guards.{name}_limit={limit:g}: {_HINTS[name]}"
        faults.append(NumericFault(name, value, action, text))
    return max(faults, key=lambda fault: SEVERITY[fault.action], default=None)


def find_reward_fault(
    guards: GuardsConfig, reward: float | None, best: float | None
) -> NumericFault | None:
    """Whether the mean reward has collapsed.

    Args:
        guards: the limits.
        reward: mean of the episode that is about to be trained on; None: the flow gives none.
        best: of the episodes before; None: there is none.
    """
    limit = guards.reward_drop_limit
    if limit is None or reward is None or best is None or best - reward <= limit:
        return None
    text = (
        f"the mean reward is {reward:.4g}, more than guards.reward_drop_limit={limit:g} below the "
        f"best so far, {best:.4g}: the policy may have collapsed"
    )
    return NumericFault("reward", reward, guards.reward_drop_action, text)
