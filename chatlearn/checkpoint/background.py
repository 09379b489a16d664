"""Writes a worker's files beside its work, and leaves a receipt when they are on the disk.

One `FileWriter` lives in each worker that saves. A module hands it jobs while it saves; they run
at once, or on a thread of their own once the module has been asked to save everything. The
receipt tells the driver what was written, or why it was not. The driver never begins a save
before every receipt of the one before is there.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.checkpoint.manifest import FileSum, sum_file
from chatlearn.errors import ChatLearnError, CheckpointError, WaitTimeoutError, is_disk_full

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

__all__ = ["FileWriter", "await_receipts", "receipt_name", "write_aside"]

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_CLOSE_S = 60.0


def receipt_name(model_name: str, replica: int, rank: int) -> str:
    """The receipt of one worker."""
    return f"{model_name}.r{replica}.{rank}.json"


def write_aside(path: Path, text: str) -> None:
    """Write a text file that appears whole."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


class FileWriter:
    """Runs the jobs that write one worker's part of a checkpoint.

    Args:
        patience_s: how long a save waits for the thread of the one before, which ends soon after
            it has left its receipt.
    """

    def __init__(self, patience_s: float = 5.0) -> None:
        self._patience_s = patience_s
        self._jobs: list[Callable[[], Iterable[Path] | None]] = []
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], Iterable[Path] | None]) -> None:
        """Run a job in `start`, after those before it; it gives the files that it wrote."""
        self._jobs.append(job)

    def start(self, root: Path, receipt: Path, *, is_async: bool) -> None:
        """Run the jobs, here or on a thread, then leave the receipt.

        Args:
            root: the checkpoint's folder, to which the receipt's names are relative.
            receipt: the file to leave.
            is_async: on a thread; errors are told in the receipt, not raised.

        Raises:
            CheckpointError: the jobs of an earlier call still run.
        """
        self.wait()
        jobs, self._jobs = self._jobs, []
        if not is_async:
            self._write(root, receipt, jobs)
            return
        self._thread = threading.Thread(
            target=self._write, args=(root, receipt, jobs), name="checkpoint", daemon=True
        )
        self._thread.start()

    def run(self, root: Path) -> dict[str, list[Any]]:
        """Run the jobs here; gives length and SHA-256 of each file, by its name under `root`.

        What a job raises is raised here.
        """
        jobs, self._jobs = self._jobs, []
        return _run_jobs(root, jobs)

    def wait(self) -> None:
        """Until the thread of the last save has ended.

        Raises:
            CheckpointError: it has not within `patience_s`.
        """
        if self._thread is not None:
            self._thread.join(self._patience_s)
            if self._thread.is_alive():
                raise CheckpointError("an earlier checkpoint is still being written")
            self._thread = None

    def close(self) -> None:
        """Let it finish within bounds."""
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def _write(
        self, root: Path, receipt: Path, jobs: Sequence[Callable[[], Iterable[Path] | None]]
    ) -> None:
        content: dict[str, Any] = {"error": "", "files": {}}
        try:
            content["files"] = _run_jobs(root, jobs)
        except Exception as error:  # noqa: BLE001 - told to the driver, whatever it is
            content["error"] = _explain(root, error)
            logger.warning("%s cannot be written: %s", root, content["error"])
        if not receipt.parent.is_dir():
            # The draft was given up.
            return
        try:
            write_aside(receipt, json.dumps(content))
        except OSError:
            # A disk that takes no receipt still lets the folder go, which ends the wait for it.
            shutil.rmtree(receipt.parent, ignore_errors=True)


def _explain(root: Path, error: Exception) -> str:
    """What went wrong; torch's own words for a full disk name no disk."""
    text = f"{type(error).__name__}: {error}"
    is_known = isinstance(error, OSError | ChatLearnError)
    return text if is_known or not is_disk_full(root) else f"the disk is full ({text})"


def _run_jobs(
    root: Path, jobs: Sequence[Callable[[], Iterable[Path] | None]]
) -> dict[str, list[Any]]:
    files: dict[str, list[Any]] = {}
    for job in jobs:
        for path in job() or ():
            found = sum_file(path, is_synced=True)
            files[path.relative_to(root).as_posix()] = [found.num_bytes, found.sha256]
    return files


def await_receipts(
    folder: Path,
    names: Sequence[str],
    deadline: float,
    is_given_up: Callable[[], bool] = lambda: False,
) -> Mapping[str, FileSum]:
    """Wait for receipts; gives the sums of the files that they tell of.

    Args:
        folder: where they appear.
        names: of all that are awaited.
        deadline: on the monotonic clock.
        is_given_up: asked between looks; True ends the wait.

    Raises:
        CheckpointError: a worker could not write, or the wait was given up.
        WaitTimeoutError: not all came in time; names those that did not.
    """
    sums: dict[str, FileSum] = {}
    left = list(names)
    while left:
        arrived = [name for name in left if (folder / name).is_file()]
        for name in arrived:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
            if content["error"]:
                raise CheckpointError(f"{name.removesuffix('.json')}: {content['error']}")
            for file, (num_bytes, sha256) in content["files"].items():
                sums[file] = FileSum(num_bytes, sha256)
        left = [name for name in left if name not in arrived]
        if not left:
            break
        if is_given_up():
            raise CheckpointError("the checkpoint was given up")
        if not folder.is_dir():
            raise CheckpointError(
                "a worker could not even write why its files are not there: is the disk full?"
            )
        if time.monotonic() > deadline:
            late = ", ".join(name.removesuffix(".json") for name in left[:8])
            raise WaitTimeoutError(
                f"these workers did not write their files of a checkpoint in time: {late}"
            )
        time.sleep(_POLL_S)
    return sums
