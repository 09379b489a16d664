"""Looks at an episode's mean reward before it is trained on."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from chatlearn.engine.reward_dump import Collapse, dump_rewards
from chatlearn.errors import NumericsError
from chatlearn.models.faults import find_reward_fault

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatlearn.config.guards import GuardsConfig
    from chatlearn.engine.rollout import Rollout

__all__ = ["may_train"]

logger = logging.getLogger(__name__)

_REWARD = "rollout/reward"


def may_train(
    guards: GuardsConfig, rollout: Rollout, history: Sequence[Mapping[str, float]], run_dir: Path
) -> bool:
    """Whether an episode may be trained on; with a limit it waits for the whole rollout.

    Args:
        guards: the limits.
        rollout: of the episode.
        history: metrics of the episodes before.
        run_dir: where the samples of an episode that has collapsed are dumped.

    Raises:
        NumericsError: the mean reward has collapsed, and that ends the run.
    """
    if guards.reward_drop_limit is None:
        return True
    rollout.finish()
    known = [entry[_REWARD] for entry in history if math.isfinite(entry.get(_REWARD, math.nan))]
    best = max(known, default=None)
    fault = find_reward_fault(guards, rollout.metrics().get(_REWARD), best)
    if fault is None or best is None:
        return True
    collapse = Collapse(fault, int(history[-1]["step"]) + 1, best)
    dump = dump_rewards(run_dir, guards, collapse, rollout.fetch_made_rows())
    told = fault.text
    if dump is not None:
        told += f"; its samples are in {dump}: run `chatlearn replay` on it"
    if fault.action == "stop":
        raise NumericsError(told)
    logger.warning("%s (%s)", told, fault.action)
    return fault.action != "skip"
