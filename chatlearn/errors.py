"""Every error that chatlearn raises on purpose, by kind.

A message says what was got, what was expected and what to change.
"""

from __future__ import annotations

import errno
import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "ChatLearnError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FlowError",
    "NumericsError",
    "PlacementError",
    "SyncError",
    "WaitTimeoutError",
    "WorkerError",
    "explain_unwritten",
    "in_one_line",
    "is_disk_full",
]

_MESSAGE_CHARS = 400
# Less than this free is nothing: file systems keep a rest that no file gets.
_FULL_BYTES = 1 << 20


class ChatLearnError(Exception):
    """Base of all errors that chatlearn raises on purpose.

    Attributes:
        is_retryable: processes or connections failed, not the program: the same again may succeed.
    """

    is_retryable: bool = False


class ConfigError(ChatLearnError):
    """The configuration cannot work; raised before any worker starts (exit code 2)."""


class PlacementError(ConfigError):
    """The models do not fit on the devices there are."""


class FlowError(ChatLearnError):
    """A flow function does something that cannot be traced or scheduled."""


class DataError(ChatLearnError):
    """Rows, batches or a data set are not what a stage needs."""


class NumericsError(ChatLearnError):
    """A loss, gradient or weight is not finite."""


class SyncError(ChatLearnError):
    """Weights cannot be moved from one model to another."""


class CheckpointError(ChatLearnError):
    """A checkpoint cannot be written or read."""


class WaitTimeoutError(ChatLearnError):
    """A bounded wait ran out.

    Args:
        message: what was awaited, and for how long.
        workers: summaries of those that were waited for, where known.
        is_explained: the message tells what they were doing.
    """

    is_retryable = True

    def __init__(
        self, message: str, workers: Sequence[Any] = (), *, is_explained: bool = False
    ) -> None:
        super().__init__(message)
        self.workers: tuple[Any, ...] = tuple(workers)
        self.is_explained = is_explained

    def explain(self, text: str) -> None:
        """Add what the workers were doing."""
        self.is_explained = True
        if text:
            self.args = (f"{self}\n{text}",)


class WorkerError(ChatLearnError):
    """A worker raised or died.

    Attributes:
        model_name: the model whose worker failed.
        rank: its rank within the replica.
        replica: the replica's index.
        node: the node's address, where known.
        flow_line: `file:line: source` of the flow call that the worker ran, if it ran one.
        worker_traceback: the worker's own traceback, empty where the worker died.
        is_death: the process is gone; otherwise it raised.
        is_collateral: a broken connection, which often only follows another rank's failure, or
            rows that were lost with the node that held them.
        has_lost_rows: the latter.
    """

    def __init__(
        self,
        message: str,
        *,
        model_name: str,
        rank: int,
        replica: int = 0,
        node: str = "",
        flow_line: str = "",
        worker_traceback: str = "",
        is_death: bool = False,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.model_name = model_name
        self.rank = rank
        self.replica = replica
        self.node = node
        self.flow_line = flow_line
        self.worker_traceback = worker_traceback
        self.is_death = is_death
        self.is_collateral = False
        self.has_lost_rows = False

    @property
    def is_retryable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the worker did not raise by itself."""
        return self.is_death or self.is_collateral

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_worker_error, (self.message, self.__dict__.copy()))

    def __str__(self) -> str:
        where = f"model {self.model_name!r}, replica {self.replica}, rank {self.rank}"
        if self.node:
            where += f", node {self.node}"
        lines = [f"{self.message} ({where})"]
        if self.flow_line:
            lines.append(f"flow line: {self.flow_line}")
        if self.worker_traceback:
            lines.append(f"worker traceback:\n{self.worker_traceback.rstrip()}")
        return "\n".join(lines)


def _rebuild_worker_error(message: str, state: dict[str, object]) -> WorkerError:
    error = WorkerError.__new__(WorkerError)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


def in_one_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length; of others than ours also its kind."""
    text = " ".join(str(error).split())
    if len(text) > _MESSAGE_CHARS:
        text = f"{text[:_MESSAGE_CHARS]} ..."
    return text if isinstance(error, ChatLearnError) else f"{type(error).__name__}: {text}"


def explain_unwritten(path: Path, error: BaseException, what: str = "written") -> str:
    """One line: what cannot be written, why, and what to do about it.

    Args:
        path: of the file or folder.
        error: what was raised; of libraries that hide the system's error also their own.
        what: cannot be done with it.
    """
    number = error.errno if isinstance(error, OSError) else None
    reason = (error.strerror if isinstance(error, OSError) else None) or in_one_line(error)
    if number is None and is_disk_full(path):
        number, reason = errno.ENOSPC, f"its disk is full ({reason})"
    advice = ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        advice = ": make room there, or set runtime.output_dir to another disk"
    elif number == errno.ENOENT:
        advice = ": was its folder removed meanwhile?"
    return f"{path} cannot be {what}: {reason}{advice}"


def is_disk_full(path: Path) -> bool:
    """Whether (nearly) nothing is free where `path` is or would be."""
    found = next((each for each in (path, *path.parents) if each.exists()), None)
    try:
        return found is not None and shutil.disk_usage(found).free < _FULL_BYTES
    except OSError:
        return False
