"""What the system says of a run's files becomes an error of ours that names the file."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from chatlearn.errors import ChatLearnError, explain_unwritten, in_one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

__all__ = ["close_all", "naming_file"]

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def naming_file(path: Path) -> Generator[None]:
    """Let an `OSError` within say in one line which file could not be written, and what to do.

    A disk that fills up shows when a buffer is flushed, where the system names no file.

    Raises:
        ChatLearnError: instead of an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise ChatLearnError(explain_unwritten(path, error)) from error


def close_all(closers: Sequence[Callable[[], None]], *, after: BaseException | None = None) -> None:
    """Call each of them, whatever becomes of those before; the first failure is raised at the end.

    Args:
        closers: what to call.
        after: an error that is on its way already, and stays the one that is raised.
    """
    first: Exception | None = None
    for close in closers:
        try:
            close()
        except Exception as failure:  # noqa: BLE001 - raised below, or told
            said = in_one_line(failure)
            if first is None and after is None:
                first = failure
            elif after is None or said != in_one_line(after):
                logger.warning("%s", said)
    if first is not None:
        raise first
