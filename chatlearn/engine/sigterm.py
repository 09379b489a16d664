"""SIGTERM as an exception at a moment when it can be dealt with."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING, Any

from chatlearn.errors import ChatLearnError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from chatlearn.flow.call_loop import CallLoop

__all__ = ["SigtermWatch", "Terminated"]


class Terminated(ChatLearnError):  # noqa: N818 - a request to stop, not an error of the run
    """SIGTERM came; a checkpoint was saved where there is something to save."""


class SigtermWatch:
    """Turns SIGTERM into `Terminated`: at once while workers start, then from within the loop.

    Attributes:
        loop: the run's loop, once there is one; it is interrupted between two waits.
    """

    def __init__(self) -> None:
        self.loop: CallLoop | None = None
        self._previous: Any = None
        self._is_requested = False
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
        if self._is_requested and isinstance(error, KeyboardInterrupt):
            raise Terminated("terminated by SIGTERM") from None

    def _request_stop(self, _number: int, _frame: object) -> None:
        self._is_requested = True
        if self.loop is None:
            # The only exception that Ray lets through its waits (seen in 2.60).
            raise KeyboardInterrupt
        self.loop.interrupt = self._stop

    def _stop(self) -> None:
        raise Terminated("terminated by SIGTERM")
