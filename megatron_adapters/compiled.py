"""Functions of tensors that become one kernel on a GPU."""

import importlib.util
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["compile_on_gpu"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def compile_on_gpu(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Compile an elementwise function when it is first called, for any sizes.

    Where torch's compiler has no Triton to compile to, the function runs as it is.

    Args:
        function: of tensors, without side effects; called for tensors on a GPU alone.
    """
    made: list[Callable[Parameters, Result]] = []

    @wraps(function)
    def call(*given: Parameters.args, **named: Parameters.kwargs) -> Result:
        if not made:
            made.append(_compile(function) if _has_triton() else function)
        return made[0](*given, **named)

    return call


def _compile(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    compiler: Any = torch.compile
    return compiler(function, dynamic=True, fullgraph=True)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
