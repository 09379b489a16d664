"""The symbolic value that stands for a batch while a flow is traced, and the recorder's slot.

`chatlearn.flow` installs a recorder for the time of one trace. The context variable here is
the one piece of module state in the project.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chatlearn.models.base import BaseModule

__all__ = ["FlowRecorder", "FlowValue", "current_recorder", "recording"]


class FlowValue:
    """Stands for the batch that a flow call takes or gives; identity is all it has.

    Indexing, arithmetic, comparison, branching, iteration, len and attribute access raise
    FlowError with the flow's line and the remedy.
    """


class FlowRecorder(Protocol):
    """What `chatlearn.flow` installs while it traces a flow."""

    def record(
        self,
        module: BaseModule,
        method_name: str,
        inputs: Sequence[FlowValue],
        constants: Mapping[str, Any],
    ) -> FlowValue:
        """Record one model call; called by the wrappers on a module's public methods."""
        ...


_RECORDER: ContextVar[FlowRecorder | None] = ContextVar("chatlearn_flow_recorder", default=None)


def current_recorder() -> FlowRecorder | None:
    """The recorder of the trace that runs in this context, if one does."""
    return _RECORDER.get()


@contextmanager
def recording(recorder: FlowRecorder) -> Iterator[None]:
    """Route model calls to `recorder` for the time of the block."""
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)
