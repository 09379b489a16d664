"""Traces a flow: runs it once with symbolic values and records the model calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import FlowError
from chatlearn.flow.graph import ROOT, FlowGraph, FlowNode, sort_nodes
from chatlearn.models.flow_value import FlowValue, current_recorder, find_flow_line, recording

if TYPE_CHECKING:
    from chatlearn.models.base import BaseModule

__all__ = ["ControlDependencies", "TracedFlow", "trace_flow"]


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
        FlowError: the flow calls no model, does something with a batch that cannot be traced,
            or returns something other than outputs of its calls. What else the function raises
            comes through as it is.
    """
    _check_function(function, name)
    recorder = _Recorder(name)
    batch = recorder.root
    with recording(recorder):
        result = function(batch)
    outputs = [recorder.index_of(value, "returns") for value in _returned(result, name)]
    if ROOT in outputs:
        raise FlowError(f"the {name} flow returns its argument: return outputs of model calls")
    graph = sort_nodes(name, recorder.nodes, outputs)
    return TracedFlow(graph, recorder.modules)


@contextmanager
def ControlDependencies(  # noqa: N802 - the name that users of this interface know
    dependencies: FlowValue | Sequence[FlowValue],
) -> Iterator[None]:
    """Calls within the block run after `dependencies`, without taking data from them.

    Args:
        dependencies: one output of a call of this flow, or several.

    Raises:
        FlowError: used outside a flow, or with something that is no output of this flow.
    """
    recorder = current_recorder()
    if not isinstance(recorder, _Recorder):
        raise FlowError("ControlDependencies is only meaningful inside a flow")
    values = [dependencies] if isinstance(dependencies, FlowValue) else list(dependencies)
    indices = [recorder.index_of(value, "depends on") for value in values]
    recorder.push_dependencies(tuple(index for index in indices if index != ROOT))
    try:
        yield
    finally:
        recorder.pop_dependencies()


class _Recorder:
    """Collects the calls of one trace."""

    def __init__(self, flow_name: str) -> None:
        self.root = FlowValue("the flow's argument")
        self.nodes: list[FlowNode] = []
        self.modules: dict[str, BaseModule] = {}
        self._flow_name = flow_name
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
        indices = tuple(dict.fromkeys(self.index_of(value, "takes") for value in inputs))
        after = tuple(sorted({index for group in self._dependencies for index in group}))
        index = len(self.nodes)
        self.nodes.append(
            FlowNode(index, module.name, method_name, indices, line, dict(constants), after)
        )
        value = FlowValue(f"output of {module.name}.{method_name}")
        self._indices[value] = index
        return value

    def index_of(self, value: object, verb: str) -> int:
        """Which node made `value`."""
        for known, index in self._indices.items():
            if known is value:
                return index
        raise FlowError(
            f"the {self._flow_name} flow {verb} {value!r}, which is neither its argument nor an "
            "output of one of its calls"
        )

    def push_dependencies(self, indices: tuple[int, ...]) -> None:
        """Calls from now on run after these."""
        self._dependencies.append(indices)

    def pop_dependencies(self) -> None:
        """End of the innermost block."""
        self._dependencies.pop()


def _check_function(function: Callable[[Any], Any], name: str) -> None:
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise FlowError(f"the {name} flow is async or a generator: write a plain function")
    try:
        signature = inspect.signature(function)
        signature.bind(None)
    except TypeError as error:
        raise FlowError(
            f"the {name} flow takes one argument, the batch; {error}: {function!r}"
        ) from error


def _returned(result: object, name: str) -> list[object]:
    if result is None:
        return []
    if isinstance(result, FlowValue):
        return [result]
    if isinstance(result, Mapping):
        return list(cast("Mapping[object, object]", result).values())
    if isinstance(result, list | tuple):
        return list(cast("Sequence[object]", result))
    raise FlowError(
        f"the {name} flow returns {type(result).__name__}; return outputs of model calls (one, or "
        "several in a tuple, list or dict) or nothing"
    )
