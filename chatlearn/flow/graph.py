"""The traced flow as a frozen record: nodes, edges, returned values. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatlearn.errors import FlowError

__all__ = [
    "ROOT",
    "TRAIN_METHOD",
    "CallSummary",
    "FlowGraph",
    "FlowNode",
    "describe_graph",
    "sort_nodes",
]

ROOT = -1
TRAIN_METHOD = "train_step"


@dataclass(frozen=True)
class FlowNode:
    """One model call.

    Attributes:
        index: position in the graph; a node's inputs have smaller indices.
        model_name: the model.
        method_name: its method.
        inputs: indices of the nodes whose rows it takes; ROOT is the raw batch.
        line: `file:line: source` of the call in the user's flow.
        constants: keyword arguments that are plain values.
        after: nodes that must have finished first, without giving data.
    """

    index: int
    model_name: str
    method_name: str
    inputs: tuple[int, ...]
    line: str
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class FlowGraph:
    """A flow: its calls in an order that respects every dependency.

    Attributes:
        name: `environment`, `trainer` or `evaluator`.
        nodes: the calls.
        outputs: indices of the returned values, in order, each once.
    """

    name: str
    nodes: tuple[FlowNode, ...]
    outputs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.nodes:
            raise FlowError(
                f"the {self.name} flow calls no model: call a method of a module on the batch"
            )

    def is_used(self, index: int) -> bool:
        """Whether a node's output is returned or is an input of another call."""
        return index in self.outputs or any(index in node.inputs for node in self.nodes)

    def returned_nodes(self) -> frozenset[int]:
        """The nodes whose output is returned or goes into one that is."""
        found = set(self.outputs)
        for node in reversed(self.nodes):
            if node.index in found:
                found.update(node.inputs)
        return frozenset(found - {ROOT})

    @property
    def model_names(self) -> tuple[str, ...]:
        """The models, in order of their first call."""
        return tuple(dict.fromkeys(node.model_name for node in self.nodes))


def sort_nodes(name: str, nodes: Sequence[FlowNode], outputs: Sequence[int]) -> FlowGraph:
    """A graph of recorded calls, re-ordered so that dependencies come first.

    A traced flow comes in such an order: an output can only be named once its call is recorded.
    Nodes that were put together in another way need not.

    Raises:
        FlowError: calls wait for each other in a cycle; names their lines.
    """
    order: list[int] = []
    placed: set[int] = set()
    left = list(range(len(nodes)))
    while left:
        ready = [
            index
            for index in left
            if all(i == ROOT or i in placed for i in (*nodes[index].inputs, *nodes[index].after))
        ]
        if not ready:
            lines = "\n".join(f"  {nodes[index].line}" for index in _trim_to_cycles(nodes, left))
            raise FlowError(f"calls of the {name} flow wait for each other in a cycle:\n{lines}")
        order.append(ready[0])
        placed.add(ready[0])
        left.remove(ready[0])
    position = {old: new for new, old in enumerate(order)}
    position[ROOT] = ROOT
    moved = tuple(
        FlowNode(
            position[old],
            nodes[old].model_name,
            nodes[old].method_name,
            tuple(position[index] for index in nodes[old].inputs),
            nodes[old].line,
            nodes[old].constants,
            tuple(position[index] for index in nodes[old].after),
        )
        for old in order
    )
    return FlowGraph(name, moved, tuple(position[index] for index in dict.fromkeys(outputs)))


def _trim_to_cycles(nodes: Sequence[FlowNode], left: Sequence[int]) -> list[int]:
    """Those of `left` that other calls wait for: without the calls behind the cycles."""
    kept = list(left)
    while True:
        needed = {i for index in kept for i in (*nodes[index].inputs, *nodes[index].after)}
        fewer = [index for index in kept if index in needed]
        if fewer == kept:
            return kept
        kept = fewer


@dataclass(frozen=True)
class CallSummary:
    """One call of a flow in words: its inputs, and what else it waits for."""

    call: str
    inputs: str
    waits_for: str
    is_returned: bool


def describe_graph(graph: FlowGraph) -> list[CallSummary]:
    """The calls of a flow, in the order in which they were made."""

    def label(index: int) -> str:
        if index == ROOT:
            return "batch"
        return f"{graph.nodes[index].model_name}.{graph.nodes[index].method_name}"

    return [
        CallSummary(
            label(node.index),
            ", ".join(map(label, node.inputs)),
            ", ".join(map(label, node.after)),
            node.index in graph.outputs,
        )
        for node in graph.nodes
    ]
