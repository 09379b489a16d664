"""The longest chain of work in which each piece had to wait for the one before. Pure."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass

__all__ = ["BusySpan", "critical_seconds"]


@dataclass(frozen=True)
class BusySpan:
    """A time in which a worker was busy.

    Attributes:
        start_s: when it began.
        end_s: when it ended.
        needs: what had to be there first: rows, a free lane, other calls' ends.
        gives: what was there after it.
    """

    start_s: float
    end_s: float
    needs: Collection[Hashable] = ()
    gives: Collection[Hashable] = ()


def critical_seconds(spans: Iterable[BusySpan]) -> float:
    """Busy seconds along the longest chain of spans that needed each other.

    The time between the spans of a chain does not count: it is what the wall clock may exceed the
    chain by.
    """
    longest: dict[Hashable, float] = {}
    seconds = 0.0
    for span in sorted(spans, key=lambda span: (span.start_s, span.end_s)):
        before = max((longest.get(key, 0.0) for key in span.needs), default=0.0)
        length = before + max(0.0, span.end_s - span.start_s)
        seconds = max(seconds, length)
        for key in span.gives:
            longest[key] = max(longest.get(key, 0.0), length)
    return seconds
