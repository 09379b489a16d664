"""Memory of a process tree: proportional set size, so that shared pages count once."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["PeakMemory", "read_pss", "read_tree_pss"]

_INTERVAL_S = 0.1


def read_pss(process_id: int) -> int:
    """Bytes of one process; pages shared by n processes count a n-th each. 0 once it is gone."""
    try:
        text = Path(f"/proc/{process_id}/smaps_rollup").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kilobytes = (line.split()[1] for line in text.splitlines() if line.startswith("Pss:"))
    return int(next(kilobytes, "0")) * 1024


def read_tree_pss(process_id: int) -> int:
    """Bytes of a process and all that descend from it."""
    try:
        root = psutil.Process(process_id)
        members = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(read_pss(member.pid) for member in members)


class PeakMemory:
    """Samples a process tree ten times a second, from entering the block to leaving it.

    Attributes:
        peak_bytes: the largest sum seen.
    """

    def __init__(self, process_id: int) -> None:
        self.peak_bytes = 0
        self._process_id = process_id
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, read_tree_pss(self._process_id))
            if self._is_over.wait(_INTERVAL_S):
                return
