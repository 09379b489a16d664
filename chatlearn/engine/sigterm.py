"""SIGTERM as an exception at a moment when it can be dealt with."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from chatlearn.errors import ChatLearnError, in_one_line

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from chatlearn.flow.call_loop import CallLoop

__all__ = ["SigtermWatch", "Terminated"]


_TEXT = "terminated by SIGTERM"


class Terminated(ChatLearnError):  # noqa: N818 - a request to stop, not an error of the run
    """SIGTERM came; a checkpoint was saved where there is something to save."""


class SigtermWatch:
    """Turns SIGTERM into `Terminated`: at once while workers start, then from within the loop.

    The second and later signals change nothing: a checkpoint may be being saved.

    Attributes:
        is_requested: SIGTERM has come.
    """

    def __init__(self) -> None:
        self.is_requested = False
        self._loop: CallLoop | None = None
        self._previous: Any = None
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._is_main:
            self._previous = signal.signal(signal.SIGTERM, self._request_stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._is_main:
            signal.signal(signal.SIGTERM, self._previous)
        if self.is_requested and isinstance(error, KeyboardInterrupt):
            raise Terminated(_TEXT) from None

    def arm(self, loop: CallLoop) -> None:
        """From now on a signal interrupts this loop, between two of its waits."""
        self._loop = loop
        if self.is_requested:
            loop.interrupt = self._stop

    def disarm(self) -> None:
        """There is no loop, and from now on a signal interrupts whatever runs.

        Raises:
            Terminated: the signal has come already.
        """
        self._loop = None
        if self.is_requested:
            self._stop()

    def heed(self, error: Exception) -> None:
        """Raise what ended the run, if it was to stop: no failure is a reason to begin again.

        Raises:
            Terminated: the run was to stop, and its workers failed meanwhile.
            Exception: the error itself, if the run was to stop.
        """
        if not self.is_requested:
            return
        if isinstance(error, ChatLearnError) and error.is_retryable:
            text = f"{_TEXT}; nothing more was saved: {in_one_line(error)}"
            raise Terminated(text) from error
        raise error

    def _request_stop(self, _number: int, _frame: object) -> None:
        is_first, self.is_requested = not self.is_requested, True
        if self._loop is not None:
            self._loop.interrupt = self._stop if is_first else self._loop.interrupt
        elif is_first:
            # The only exception that Ray lets through its waits (seen in 2.60).
            raise KeyboardInterrupt

    def _stop(self) -> None:
        raise Terminated(_TEXT)
