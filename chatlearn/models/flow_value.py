"""The symbolic value that stands for a batch while a flow is traced, and the recorder's slot.

`chatlearn.flow` installs a recorder for the time of one trace. The context variable here is the
only state that this package keeps.
"""

from __future__ import annotations

import linecache
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from chatlearn.errors import FlowError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chatlearn.models.base import BaseModule

__all__ = ["FlowRecorder", "FlowValue", "current_recorder", "find_flow_line", "recording"]

_REMEDY = (
    "a flow only says which model's output goes where; write this as a method of a module and "
    "call that method in the flow"
)


def find_flow_line() -> str:
    """`file:line: source` of the nearest caller outside this package: the flow's own line."""
    package = str(Path(__file__).resolve().parent.parent)
    frame = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(package) and not filename.endswith("contextlib.py"):
            source = linecache.getline(filename, frame.f_lineno, frame.f_globals).strip()
            where = f"{filename}:{frame.f_lineno}"
            return f"{where}: {source}" if source else where
        frame = frame.f_back
    return "<unknown line>"


class FlowValue:
    """Stands for the batch that a flow call takes or gives; identity is all it has."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __repr__(self) -> str:
        return f"<batch: {object.__getattribute__(self, '_name')}>"

    def __hash__(self) -> int:
        return id(self)

    def __bool__(self) -> bool:
        self._refuse("is used as a condition")

    def __eq__(self, other: object) -> bool:
        self._refuse("is compared")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self._refuse(f"is asked for its attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        self._refuse(f"is given an attribute {name!r}")

    def _refuse_index(self, *_operands: object) -> NoReturn:
        self._refuse("is indexed")

    def _refuse_arithmetic(self, *_operands: object) -> NoReturn:
        self._refuse("is calculated with")

    def _refuse_comparison(self, *_operands: object) -> NoReturn:
        self._refuse("is compared")

    def _refuse_loop(self, *_operands: object) -> NoReturn:
        self._refuse("is looped over, unpacked or measured")

    def _refuse_call(self, *_operands: object, **_named: object) -> NoReturn:
        self._refuse("is called or entered")

    __getitem__ = __setitem__ = __delitem__ = _refuse_index
    __add__ = __radd__ = __iadd__ = __sub__ = __rsub__ = __isub__ = _refuse_arithmetic
    __mul__ = __rmul__ = __imul__ = __truediv__ = __rtruediv__ = __itruediv__ = _refuse_arithmetic
    __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = _refuse_arithmetic
    __matmul__ = __rmatmul__ = __and__ = __rand__ = __or__ = __ror__ = _refuse_arithmetic
    __xor__ = __rxor__ = __neg__ = __pos__ = __abs__ = __invert__ = _refuse_arithmetic
    __int__ = __float__ = __index__ = __round__ = _refuse_arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = __ne__ = _refuse_comparison
    __iter__ = __next__ = __len__ = __contains__ = __reversed__ = _refuse_loop
    __call__ = __enter__ = __exit__ = _refuse_call

    def _refuse(self, what: str) -> NoReturn:
        raise FlowError(f"{find_flow_line()}\n{self!r} {what}, but {_REMEDY}")


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
