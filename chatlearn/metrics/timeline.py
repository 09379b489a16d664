"""What ran when, in the Chrome trace format (chrome://tracing, Perfetto)."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from chatlearn.metrics.unwritten import naming_file

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Timeline"]

_HEAD, _TAIL = '{"traceEvents": [', "]}"
_MICROSECONDS = 1e6


class Timeline:
    """Collects spans and writes them as one JSON file.

    Each write appends what is new before the file's last brackets, so that it costs the same late
    in a long run, and the file is valid JSON after each.

    Args:
        path: the file.
        max_spans: at most so many are in the file; beyond, the older half goes.
    """

    def __init__(self, path: Path, max_spans: int = 200_000) -> None:
        self._path = path
        self._max_spans = max_spans
        self._lanes: dict[str, int] = {}
        self._names: list[str] = []
        self._spans: list[str] = []
        self._new: list[str] = []
        self._end = 0

    def add(self, name: str, lane: str, start_s: float, end_s: float) -> None:
        """Add one span.

        Args:
            name: what ran.
            lane: where; each lane is a row of the picture.
            start_s: seconds since the epoch.
            end_s: seconds since the epoch.
        """
        row = self._lanes.get(lane)
        if row is None:
            row = self._lanes[lane] = len(self._lanes)
            naming = {"name": "thread_name", "ph": "M", "pid": 0, "tid": row}
            self._names.append(json.dumps({**naming, "args": {"name": lane}}))
            self._new.append(self._names[-1])
        span = {
            "name": name,
            "ph": "X",
            "ts": start_s * _MICROSECONDS,
            "dur": max(0.0, end_s - start_s) * _MICROSECONDS,
            "pid": 0,
            "tid": row,
        }
        self._spans.append(json.dumps(span))
        self._new.append(self._spans[-1])

    def write(self) -> None:
        """Bring the file up to date.

        Raises:
            ChatLearnError: it cannot be written, or is gone.
        """
        with naming_file(self._path):
            self._write()

    def _write(self) -> None:
        if len(self._spans) > self._max_spans:
            del self._spans[: -(self._max_spans // 2)]
            self._end = 0
        if not self._end:
            draft = self._path.with_suffix(".partial")
            text = _HEAD + ", ".join(self._names + self._spans)
            draft.write_text(text + _TAIL, encoding="utf-8")
            os.replace(draft, self._path)
            # Nothing can be appended to an empty list.
            self._end = len(text.encode()) if self._names else 0
        elif self._new:
            more = "".join(f", {event}" for event in self._new).encode()
            with self._path.open("r+b", buffering=0) as file:
                file.seek(self._end)
                file.write(more + _TAIL.encode())
            self._end += len(more)
        self._new = []
