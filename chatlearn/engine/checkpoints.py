"""Writes a run's checkpoints, beside its work where the config wants that. Driver side.

Workers take a copy of what they save and write it on threads of their own; a thread here waits
for their receipts, adds what the driver knows, and renames. The run goes on meanwhile. At most one
checkpoint is being written.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shutil
import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatlearn.checkpoint.background import await_receipts, receipt_name
from chatlearn.checkpoint.folders import CheckpointDraft, begin_checkpoint, prune_checkpoints
from chatlearn.engine.worker_calls import SaveOrder, save_worker
from chatlearn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatlearn.checkpoint.run_state import RunState
    from chatlearn.engine.session import Session

__all__ = ["CheckpointContent", "Checkpoints"]

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
    """

    def __init__(self, session: Session, folder: Path) -> None:
        self._session = session
        self._runtime = session.config.runtime
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._is_given_up = threading.Event()

    def save(self, content: CheckpointContent, *, is_async: bool) -> Path:
        """Begin a checkpoint, and where it is not asynchronous finish it; gives its folder to be.

        Raises:
            CheckpointError: this or the one before cannot be written.
        """
        self.finish()
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
            raise CheckpointError(f"{draft.folder} cannot be written: {error}") from error
        except BaseException:
            draft.discard()
            raise
        self._is_given_up.clear()
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
            CheckpointError: it cannot be written, or not in time.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(self._runtime.stage_timeout_s + 60.0)
            if thread.is_alive():
                self._is_given_up.set()
                raise CheckpointError("the checkpoint is still being written; it is given up")
        error, self._error = self._error, None
        if error is not None:
            raise error

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
            prune_checkpoints(self._folder, self._runtime.save_total_limit)
        except Exception as error:  # noqa: BLE001 - raised by `finish` in the run's thread
            draft.discard()
            self._error = (
                error
                if isinstance(error, CheckpointError)
                else CheckpointError(f"{draft.final} cannot be written: {error}")
            )


def _read_versions() -> dict[str, str]:
    """Versions of what a checkpoint's content depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
