"""What ran when, in the Chrome trace format (chrome://tracing, Perfetto)."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Timeline"]

_MAX_SPANS = 200_000


class Timeline:
    """Collects spans and writes them as one JSON file; keeps the newest 200,000.

    Args:
        path: the file; it is replaced as a whole, so it is valid JSON at any time.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._spans: list[dict[str, Any]] = []
        self._lanes: dict[str, int] = {}

    def add(self, name: str, lane: str, start_s: float, end_s: float) -> None:
        """Add one span.

        Args:
            name: what ran.
            lane: where; each lane is a row of the picture.
            start_s: seconds since the epoch.
            end_s: seconds since the epoch.
        """
        row = self._lanes.setdefault(lane, len(self._lanes))
        microseconds = 1e6
        self._spans.append(
            {
                "name": name,
                "ph": "X",
                "ts": start_s * microseconds,
                "dur": max(0.0, end_s - start_s) * microseconds,
                "pid": 0,
                "tid": row,
            }
        )
        del self._spans[:-_MAX_SPANS]

    def write(self) -> None:
        """Write the file anew."""
        names = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": lane}}
            for lane, row in self._lanes.items()
        ]
        draft = self._path.with_suffix(".partial")
        draft.write_text(json.dumps({"traceEvents": names + self._spans}), encoding="utf-8")
        os.replace(draft, self._path)
