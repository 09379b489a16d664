"""Traces a flow: runs it once with symbolic values and records the model calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import FlowError
from chatlearn.flow.graph import ROOT, FlowGraph, FlowNode, sort_nodes
from chatlearn.models.flow_value import FlowValue, current_recorder, find_flow_line, recording

if TYPE_CHECKING:
    from chatlearn.models.base import BaseModule

__all__ = ["ControlDependencies", "TracedFlow", "trace_flow"]

_RETURN_REMEDY = (
    "return outputs of model calls (one, or several in a tuple, list or dict) or nothing"
)


@dataclass(frozen=True)
class TracedFlow:
    """A flow's graph and the modules that it calls, by name."""

    graph: FlowGraph
    modules: Mapping[str, BaseModule]


def trace_flow(function: Callable[[Any], Any], *, name: str) -> TracedFlow:
    """Run `function` once on a symbolic batch and record its model calls.

    Args:
        function: the user's flow, a function of one argument.
        name: what the flow is, for messages.

    Raises:
        FlowError: the flow is not a plain function of one argument, calls no model, does
            something with a batch that cannot be traced, or returns something other than
            outputs of its calls. What else the function raises comes through as it is.
    """
    flow = _describe_function(function, name)
    _check_function(function, flow)
    recorder = _Recorder()
    with recording(recorder):
        result = function(recorder.root)
    outputs = [_output_index(recorder, value, flow) for value in _returned(result, flow)]
    if not recorder.nodes:
        raise FlowError(
            f"{flow} calls no model: call a method of a module on the batch, such as "
            "policy.forward_step(batch)"
        )
    return TracedFlow(sort_nodes(name, recorder.nodes, outputs), recorder.modules)


@contextmanager
def ControlDependencies(  # noqa: N802 - the name that users of this interface know
    dependencies: Any,
) -> Generator[None]:
    """Calls within the block run after `dependencies`, without taking data from them.

    Args:
        dependencies: one output of a call of this flow, or several in a list or tuple. (To a type
            checker an output is what the method returns, hence Any.)

    Raises:
        FlowError: used outside a flow, or with something that is no output of this flow.
    """
    recorder = current_recorder()
    if not isinstance(recorder, _Recorder):
        raise FlowError(
            f"{find_flow_line()}\nControlDependencies is used outside a flow: use it in a function "
            "that is given to Environment, Trainer or Evaluator"
        )
    several = isinstance(dependencies, list | tuple)
    values = cast("Sequence[object]", dependencies if several else (dependencies,))
    indices = [recorder.index_of(value) for value in values]
    if None in indices:
        raise FlowError(
            f"{find_flow_line()}\nControlDependencies got {dependencies!r}; expected an output of "
            "a call of this flow, or several in a list or tuple"
        )
    recorder.push_dependencies(tuple(i for i in indices if i is not None and i != ROOT))
    try:
        yield
    finally:
        recorder.pop_dependencies()


class _Recorder:
    """Collects the calls of one trace."""

    def __init__(self) -> None:
        self.root = FlowValue("the flow's argument")
        self.nodes: list[FlowNode] = []
        self.modules: dict[str, BaseModule] = {}
        self._indices: dict[FlowValue, int] = {self.root: ROOT}
        self._dependencies: list[tuple[int, ...]] = []

    def record(
        self,
        module: BaseModule,
        method_name: str,
        inputs: Sequence[FlowValue],
        constants: Mapping[str, Any],
    ) -> FlowValue:
        """Append one call; gives the value that stands for its output."""
        line = find_flow_line()
        if self.modules.setdefault(module.name, module) is not module:
            raise FlowError(
                f"{line}\ntwo different models are called {module.name!r}: give each model a name "
                "of its own"
            )
        indices = [self.index_of(value) for value in dict.fromkeys(inputs)]
        if None in indices:
            raise FlowError(
                f"{line}\n{module.name}.{method_name} takes {inputs[indices.index(None)]!r} of "
                "another flow: pass this flow's argument or an output of its calls"
            )
        after = tuple(sorted({index for group in self._dependencies for index in group}))
        index = len(self.nodes)
        self.nodes.append(
            FlowNode(
                index,
                module.name,
                method_name,
                tuple(found for found in indices if found is not None),
                line,
                dict(constants),
                after,
            )
        )
        value = FlowValue(f"output of {module.name}.{method_name}")
        self._indices[value] = index
        return value

    def index_of(self, value: object) -> int | None:
        """Which node made `value`; ROOT for the flow's argument, None for anything else."""
        return self._indices.get(value) if isinstance(value, FlowValue) else None

    def push_dependencies(self, indices: tuple[int, ...]) -> None:
        """Calls from now on run after these."""
        self._dependencies.append(indices)

    def pop_dependencies(self) -> None:
        """End of the innermost block."""
        self._dependencies.pop()


def _describe_function(function: Callable[[Any], Any], name: str) -> str:
    """How messages call the flow: its part, and where it is defined."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return f"the {name} flow {function!r}"
    return f"the {name} flow {code.co_name} ({code.co_filename}:{code.co_firstlineno})"


def _check_function(function: Callable[[Any], Any], flow: str) -> None:
    kinds = (
        inspect.iscoroutinefunction,
        inspect.isgeneratorfunction,
        inspect.isasyncgenfunction,
    )
    if any(is_kind(function) for is_kind in kinds):
        raise FlowError(f"{flow} is async or a generator: write a plain function")
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise FlowError(f"{flow} must take one argument, the batch: {error}") from error


def _returned(result: object, flow: str) -> list[object]:
    if result is None:
        return []
    if isinstance(result, FlowValue):
        return [result]
    if isinstance(result, Mapping):
        return list(cast("Mapping[object, object]", result).values())
    if isinstance(result, list | tuple):
        return list(cast("Sequence[object]", result))
    raise FlowError(f"{flow} returns {result!r}; {_RETURN_REMEDY}")


def _output_index(recorder: _Recorder, value: object, flow: str) -> int:
    index = recorder.index_of(value)
    if index is None or index == ROOT:
        what = "its argument" if index == ROOT else repr(value)
        raise FlowError(f"{flow} returns {what}; {_RETURN_REMEDY}")
    return index
