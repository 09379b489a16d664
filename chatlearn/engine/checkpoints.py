"""Writes a run's checkpoints, beside its work where the config wants that. Driver side.

Workers take a copy of what they save and write it on threads of their own; a thread here waits
for their receipts, adds what the driver knows, and renames. The run goes on meanwhile. At most one
checkpoint is being written.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import platform
import shutil
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatlearn.checkpoint.background import await_receipts, receipt_name
from chatlearn.checkpoint.drafts import remove_drafts
from chatlearn.checkpoint.folders import (
    CheckpointDraft,
    begin_checkpoint,
    prune_checkpoints,
)
from chatlearn.engine.worker_calls import SaveOrder, save_worker
from chatlearn.errors import (
    ChatLearnError,
    CheckpointError,
    WorkerError,
    explain_unwritten,
    in_one_line,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatlearn.checkpoint.run_state import RunState
    from chatlearn.engine.session import Session
    from chatlearn.runtime.contract import WorkerGroup

__all__ = ["CheckpointContent", "Checkpoints"]

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_COMMIT_S = 60.0
_PACKAGES = ("chatlearn", "torch", "megatron-core", "ray", "transformer-engine", "numpy")


@dataclass(frozen=True)
class CheckpointContent:
    """What goes into a checkpoint besides what workers know.

    Attributes:
        state: of the run.
        metrics: lines of `metrics.jsonl` up to here.
        write_extra: writes further files of the driver into the draft's folder.
        is_of_start: workers' random generators as they were when the episode began.
    """

    state: RunState
    metrics: str
    write_extra: Callable[[Path], None] = lambda _folder: None
    is_of_start: bool = False


class Checkpoints:
    """The checkpoints of one run.

    Args:
        session: the run.
        folder: where they go.

    Attributes:
        is_lost: the last one is not there, since a worker was replaced while it was written.
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._runtime = session.config.runtime
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_given_up = threading.Event()
        self._draft: CheckpointDraft | None = None
        self._replaced = ""
        self._verified: set[Path] = set()
        self.is_lost = False
        session.on_restart.append(self._lose)

    def save(self, content: CheckpointContent, *, is_async: bool) -> Path:
        """Begin a checkpoint, and where it is not asynchronous finish it; gives its folder to be.

        Raises:
            CheckpointError: this or the one before cannot be written.
            WorkerError: a worker died while one was written, and was not replaced.
            WaitTimeoutError: one was not written in time.
        """
        self.finish()
        self.is_lost = False
        draft = begin_checkpoint(self._folder, content.state.episode)
        try:
            (draft.folder / "metrics.jsonl").write_text(content.metrics, encoding="utf-8")
            shutil.copyfile(self._session.run_dir / "config.yaml", draft.folder / "config.yaml")
            versions = json.dumps(_read_versions(), indent=1)
            (draft.folder / "versions.json").write_text(versions, encoding="utf-8")
            content.write_extra(draft.folder)
            self._tell_workers(draft, content, is_async)
        except OSError as error:
            draft.discard()
            raise CheckpointError(explain_unwritten(draft.folder, error)) from error
        except BaseException:
            draft.discard()
            raise
        self._is_given_up.clear()
        self._draft, self._replaced = draft, ""
        state = replace(content.state, created_s=time.time())
        self._thread = threading.Thread(
            target=self._commit, args=(draft, state), name="checkpoint", daemon=True
        )
        self._thread.start()
        if not is_async:
            self.finish()
        return draft.final

    def check(self) -> None:
        """Raise what went wrong with the last checkpoint, if its end has come."""
        if self._thread is not None and not self._thread.is_alive():
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is there.

        Raises:
            CheckpointError: it cannot be written.
            WorkerError: a worker died meanwhile, and was not replaced.
            WaitTimeoutError: it was not written in time.
        """
        if self._thread is not None:
            self._await(self._thread)
            self._thread = None
        error, self._error = self._error, None
        if error is None:
            return
        if not self._replaced:
            raise error
        self.is_lost = True
        logger.warning(
            "a checkpoint was given up, since %s was replaced while it was written", self._replaced
        )

    def _await(self, thread: threading.Thread) -> None:
        """Until the thread has ended; a worker that dies meanwhile is replaced or raised."""
        deadline = time.monotonic() + self._runtime.stage_timeout_s + _COMMIT_S
        while thread.is_alive():
            thread.join(_POLL_S)
            try:
                self._session.backend.check()
            except WorkerError as error:
                if not self._session.loop.recover(error):
                    raise
            if time.monotonic() > deadline:
                self._is_given_up.set()
                self._thread = None
                raise CheckpointError("the checkpoint is still being written; it is given up")

    def _lose(self, group: WorkerGroup) -> None:
        """A replica was replaced: what it had yet to write will not come."""
        if self._thread is None or self._draft is None:
            return
        names = [receipt_name(w.model_name, w.replica, w.rank) for w in group.workers]
        if not all((self._draft.receipts / name).is_file() for name in names):
            self._replaced = f"{group.model_name}.r{group.replica}"
            self._is_given_up.set()

    def give_up(self) -> None:
        """End without the checkpoint that is being written, if there is one."""
        self._is_given_up.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(60.0)
        self._error = None

    def _tell_workers(
        self, draft: CheckpointDraft, content: CheckpointContent, is_async: bool
    ) -> None:
        session, state = self._session, content.state
        calls = {
            (name, group.replica): list(
                group.call(
                    save_worker,
                    SaveOrder(
                        draft.folder,
                        state.train_iteration,
                        name in state.trained or (name in state.stale and group.replica == 0),
                        is_async,
                        content.is_of_start,
                    ),
                )
            )
            for name, groups in session.groups.items()
            for group in groups
        }
        session.collect(calls, "save_checkpoint")

    def _commit(self, draft: CheckpointDraft, state: RunState) -> None:
        names = [
            receipt_name(worker.model_name, worker.replica, worker.rank)
            for groups in self._session.groups.values()
            for group in groups
            for worker in group.workers
        ]
        deadline = time.monotonic() + self._runtime.stage_timeout_s
        try:
            sums = await_receipts(draft.receipts, names, deadline, self._is_given_up.is_set)
            draft.commit(state, sums)
        except Exception as error:  # noqa: BLE001 - raised by `finish` in the run's thread
            draft.discard()
            self._error = (
                error
                if isinstance(error, ChatLearnError)
                else CheckpointError(explain_unwritten(draft.final, error))
            )
            return
        try:
            remove_drafts(self._folder)
            prune_checkpoints(self._folder, self._runtime.save_total_limit, self._verified)
        except Exception as error:  # noqa: BLE001 - the new checkpoint is there
            logger.warning("old checkpoints cannot be removed: %s", in_one_line(error))


def _read_versions() -> dict[str, str]:
    """Versions of what a checkpoint's content depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
