"""What collective a process entered last, for messages about calls that do not end.

`install` wraps torch.distributed's functions once, in a worker process, before other packages
take them; each call then costs a microsecond more.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CollectiveLog", "install"]

_FUNCTIONS = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object",
    "all_reduce", "all_to_all", "all_to_all_single", "barrier", "batch_isend_irecv", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "monitored_barrier",
    "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter",
    "scatter_object_list", "send",
)  # fmt: skip


class CollectiveLog:
    """The last collective of this process, and how many there were."""

    def __init__(self) -> None:
        self._name = ""
        self._shape: tuple[int, ...] = ()
        self._count = 0
        self._entered_s = 0.0
        self._depth = 0

    def enter(self, name: str, arguments: tuple[Any, ...]) -> None:
        """A collective begins; one within another does not count."""
        self._depth += 1
        if self._depth > 1:
            return
        first = arguments[0] if arguments else None
        self._name = name
        self._shape = tuple(getattr(first, "shape", ()))
        self._count += 1
        self._entered_s = time.time()

    def leave(self) -> None:
        """It has returned."""
        self._depth -= 1

    def describe(self) -> str:
        """The last one, whether it has returned, and when it began."""
        if not self._count:
            return "no collective yet"
        state = "in" if self._depth else "after"
        shape = f" {list(self._shape)}" if self._shape else ""
        ago = time.time() - self._entered_s
        return f"{state} {self._name}{shape}, number {self._count}, begun {ago:.0f} s ago"


def install(log: CollectiveLog) -> None:
    """Let torch.distributed's functions tell the log."""
    import torch.distributed as dist

    for name in _FUNCTIONS:
        function = getattr(dist, name, None)
        if function is not None:
            wrapped = _wrap(log, name, function)
            setattr(dist, name, wrapped)
            setattr(dist.distributed_c10d, name, wrapped)


def _wrap(log: CollectiveLog, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def logged(*arguments: Any, **options: Any) -> Any:
        log.enter(name, arguments)
        try:
            return function(*arguments, **options)
        finally:
            log.leave()

    return logged
