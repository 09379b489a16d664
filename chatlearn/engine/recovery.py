"""What becomes of a run whose workers die: replaced in place where that is exact, else rolled back.

A replica of a model that is not trained is started again where its weights can be had as they
were: from the config, from a trainer that has not moved on, or from another replica. Its
unfinished calls are made again, as they were, so that every sample enters the training data once.
Everything else takes the run back to its last checkpoint, with all workers new.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from chatlearn.errors import ChatLearnError, PlacementError
from chatlearn.metrics.unwritten import naming_file
from chatlearn.models.base import BaseModule

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatlearn.engine.session import Session
    from chatlearn.engine.syncs import WeightSyncs
    from chatlearn.errors import WorkerError
    from chatlearn.runtime.contract import WorkerGroup

__all__ = ["Recovery", "RecoveryBudget", "ReplicaRecovery"]

logger = logging.getLogger(__name__)

IN_PLACE, ROLL_BACK = "in_place", "roll_back"


@dataclass(frozen=True)
class Recovery:
    """One recovery, as `recoveries.jsonl` has it.

    Attributes:
        time_s: when it was over, seconds since the epoch.
        kind: `in_place` or `roll_back`.
        cause: what had happened, one line.
        model: whose worker had failed, where known.
        replica: of the model.
        rank: of the replica.
        lost_s: work that is done again, seconds.
        lost_steps: episodes that are done again; for `in_place` 0.
        lost_calls: calls that are made again, for `in_place`.
        recovery_s: from the failure's being noticed until the run went on.
    """

    time_s: float
    kind: str
    cause: str
    model: str
    replica: int
    rank: int
    lost_s: float
    lost_steps: int
    lost_calls: int
    recovery_s: float


class RecoveryBudget:
    """How often the run may still recover, and the account of how often it did.

    Args:
        limit: `runtime.max_restarts`.
        path: of `recoveries.jsonl`.
        tell: gets a line for a person.
    """

    def __init__(self, limit: int, path: Path, tell: Callable[[str], None]) -> None:
        self._left = limit
        self._limit = limit
        self._path = path
        self._tell = tell
        self._has_told = False

    def take(self, error: BaseException) -> bool:
        """Whether the run may recover from this error; counts it."""
        if not isinstance(error, ChatLearnError) or not error.is_retryable:
            return False
        if self._left <= 0:
            if self._limit and not self._has_told:
                self._tell(
                    f"{self._limit} of {self._limit} recoveries (runtime.max_restarts) are used "
                    "up: this failure ends the run"
                )
                self._has_told = True
            return False
        self._left -= 1
        return True

    def give_back(self) -> None:
        """A recovery turned out to be impossible in this way; another may be tried."""
        self._left += 1

    def record(self, recovery: Recovery) -> None:
        """Write down a recovery that has succeeded."""
        with naming_file(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(recovery)) + "\n")
        number = self._limit - self._left
        what = (
            f"{recovery.model}.r{recovery.replica} was started again, {recovery.lost_calls} calls "
            "are made again"
            if recovery.kind == IN_PLACE
            else f"all workers were started again, {recovery.lost_steps} episodes are done again"
        )
        self._tell(
            f"recovery {number} of {self._limit}: {recovery.cause}: {what}; lost "
            f"{recovery.lost_s:.1f} s, recovered in {recovery.recovery_s:.1f} s"
        )


class ReplicaRecovery:
    """Replaces single replicas while the run goes on; the loop calls it with what failed.

    Args:
        session: the run.
        syncs: where weights come from.
        budget: how often that may happen.
    """

    def __init__(self, session: Session, syncs: WeightSyncs, budget: RecoveryBudget) -> None:
        self._session = session
        self._syncs = syncs
        self._budget = budget
        self._is_recovering = False

    def recover(self, error: WorkerError) -> bool:
        """Replace the replica whose worker failed; False where the run has to go back instead.

        Raises:
            ChatLearnError: the program failed meanwhile.
        """
        group = self._find_group(error)
        if group is None or self._is_recovering or not self._budget.take(error):
            return False
        loop, start_s = self._session.loop, time.monotonic()
        source = self._syncs.find_source(group)
        lost = loop.take_lost(group.model_name, group.replica) if source is not None else None
        if source is None or lost is None:
            self._budget.give_back()
            return False
        logger.warning("%s", error)
        self._is_recovering = True
        self._session.pool.hold(group)
        try:
            with loop.uninterrupted():
                self._session.backend.restart(group.model_name, group.replica)
                self._session.set_up_again(group)
                self._syncs.refresh(group, source)
        except ChatLearnError as failure:
            if not failure.is_retryable and not isinstance(failure, PlacementError):
                # What a program raises is not tried again.
                raise
            logger.warning("%s.r%d: %s", group.model_name, group.replica, failure)
            self._budget.give_back()
            return False
        finally:
            self._is_recovering = False
            self._session.pool.let_go(group)
        for again in lost.again:
            again()
        self._budget.record(
            Recovery(
                time.time(),
                IN_PLACE,
                error.message.partition("\n")[0],
                error.model_name,
                error.replica,
                error.rank,
                lost.seconds,
                0,
                len(lost.again),
                time.monotonic() - start_s,
            )
        )
        return True

    def _find_group(self, error: WorkerError) -> WorkerGroup | None:
        """The replica to replace; None where that is not enough, or not known."""
        flows = self._session.plan.flows
        if error.has_lost_rows or error.model_name in flows.trainable:
            return None
        module = flows.modules.get(error.model_name)
        if module is not None and type(module).worker_state is not BaseModule.worker_state:
            # What it keeps from row to row is in checkpoints only.
            return None
        groups = self._session.groups.get(error.model_name, ())
        return next((group for group in groups if group.replica == error.replica), None)
