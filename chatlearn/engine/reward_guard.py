"""Looks at an episode's mean reward before it is trained on."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from chatlearn.errors import NumericsError
from chatlearn.models.faults import find_reward_fault

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatlearn.config.guards import GuardsConfig
    from chatlearn.engine.rollout import Rollout

__all__ = ["may_train"]

logger = logging.getLogger(__name__)

_REWARD = "rollout/reward"


def may_train(
    guards: GuardsConfig, rollout: Rollout, history: Sequence[Mapping[str, float]]
) -> bool:
    """Whether an episode may be trained on; with a limit it waits for the whole rollout.

    Args:
        guards: the limits.
        rollout: of the episode.
        history: metrics of the episodes before.

    Raises:
        NumericsError: the mean reward has collapsed, and that ends the run.
    """
    if guards.reward_drop_limit is None:
        return True
    rollout.finish()
    known = [entry[_REWARD] for entry in history if math.isfinite(entry.get(_REWARD, math.nan))]
    fault = find_reward_fault(guards, rollout.metrics().get(_REWARD), max(known, default=None))
    if fault is None:
        return True
    if fault.action == "stop":
        raise NumericsError(fault.text)
    logger.warning("%s (%s)", fault.text, fault.action)
    return fault.action != "skip"
