"""The symbolic value that stands for a batch while a flow is traced, and the recorder's slot.

`chatlearn.flow` installs a recorder for the time of one trace. The context variable here is the
only state that this package keeps.
"""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from chatlearn.errors import FlowError

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from types import FrameType
    from typing import Self

    from chatlearn.models.base import BaseModule

__all__ = ["FlowRecorder", "FlowValue", "current_recorder", "find_flow_line", "recording"]

_REMEDY = (
    "a flow only says which model's output goes where; write this as a method of a module and "
    "call that method in the flow"
)
_PACKAGE = Path(__file__).parent.parent
_MACHINERY = tuple(f"{_PACKAGE / name}{os.sep}" for name in ("models", "flow"))
_TRACE = str(_PACKAGE / "flow" / "trace.py")
_LIBRARIES = (
    *(sysconfig.get_path(kind) + os.sep for kind in ("stdlib", "purelib", "platlib")),
    "<frozen ",
)


def find_flow_line() -> str:
    """`file:line: source` of the line of the user's flow that runs now.

    The frames between this package's own and the trace below them are the flow and what it
    calls; the innermost of them that is no library is the line that the user can change.
    """
    frames = _flow_frames()
    if not frames:
        return "<unknown line>"
    own = [frame for frame in frames if not frame.f_code.co_filename.startswith(_LIBRARIES)]
    frame = (own or frames)[0]
    filename = frame.f_code.co_filename
    source = linecache.getline(filename, frame.f_lineno, frame.f_globals).strip()
    where = f"{filename}:{frame.f_lineno}"
    return f"{where}: {source}" if source else where


def _flow_frames() -> list[FrameType]:
    # Python's own way for this; `inspect` reads source files besides.
    frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_filename.startswith(_MACHINERY):
        frame = frame.f_back
    frames: list[FrameType] = []
    while frame is not None and not frame.f_code.co_filename.startswith(_TRACE):
        frames.append(frame)
        frame = frame.f_back
    return frames


class FlowValue:
    """Stands for the batch that a flow call takes or gives; identity is all it has.

    It can be printed, kept in lists and dicts, copied (to itself) and handed to helper functions
    and models. Whatever would need the rows raises FlowError with the flow's line.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "_name", name)

    def __repr__(self) -> str:
        return f"<batch: {object.__getattribute__(self, '_name')}>"

    def __format__(self, specification: str) -> str:
        return format(repr(self), specification)

    def __hash__(self) -> int:
        return id(self)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self._refuse("is pickled")

    def __bool__(self) -> NoReturn:
        self._refuse("is used as a condition")

    def __eq__(self, other: object) -> NoReturn:
        self._refuse("is compared")

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        self._refuse(f"is asked for its attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> NoReturn:
        self._refuse(f"is given an attribute {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        self._refuse(f"loses its attribute {name!r}")

    @classmethod
    def __torch_function__(
        cls, function: object, types: object, args: object = (), kwargs: object = None
    ) -> NoReturn:
        name = getattr(function, "__name__", repr(function))
        raise FlowError(f"{find_flow_line()}\na batch is passed to torch's {name}, but {_REMEDY}")

    def _refuse_index(self, *_operands: object) -> NoReturn:
        self._refuse("is indexed")

    def _refuse_arithmetic(self, *_operands: object) -> NoReturn:
        self._refuse("is calculated with")

    def _refuse_comparison(self, *_operands: object) -> NoReturn:
        self._refuse("is compared")

    def _refuse_loop(self, *_operands: object) -> NoReturn:
        self._refuse("is looped over, unpacked, searched or measured")

    def _refuse_call(self, *_operands: object, **_named: object) -> NoReturn:
        self._refuse("is called or entered")

    def _refuse_conversion(self, *_operands: object, **_named: object) -> NoReturn:
        self._refuse("is converted to a number, an array or bytes")

    __getitem__ = __setitem__ = __delitem__ = _refuse_index
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _refuse_arithmetic
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = _refuse_arithmetic
    __mod__ = __rmod__ = __divmod__ = __rdivmod__ = __pow__ = __rpow__ = _refuse_arithmetic
    __matmul__ = __rmatmul__ = __lshift__ = __rlshift__ = _refuse_arithmetic
    __rshift__ = __rrshift__ = __and__ = __rand__ = __or__ = __ror__ = _refuse_arithmetic
    __xor__ = __rxor__ = __neg__ = __pos__ = __abs__ = __invert__ = _refuse_arithmetic
    __lt__ = __le__ = __gt__ = __ge__ = __ne__ = _refuse_comparison
    __iter__ = __next__ = __len__ = __contains__ = __reversed__ = _refuse_loop
    __aiter__ = __anext__ = __await__ = _refuse_loop
    __call__ = __enter__ = __exit__ = __aenter__ = __aexit__ = _refuse_call
    __int__ = __float__ = __complex__ = __index__ = __round__ = _refuse_conversion
    __trunc__ = __floor__ = __ceil__ = __bytes__ = __array__ = _refuse_conversion

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
def recording(recorder: FlowRecorder) -> Generator[None]:
    """Route model calls to `recorder` for the time of the block."""
    token = _RECORDER.set(recorder)
    try:
        yield
    finally:
        _RECORDER.reset(token)
