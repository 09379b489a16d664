"""What a graph allows to run at the same time, on given devices. Pure.

The executor finds this order as it goes, row by row; the plan says beforehand what to expect.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from chatlearn.flow.graph import ROOT, TRAIN_METHOD, FlowGraph, FlowNode

__all__ = ["Stage", "plan_stages"]


@dataclass(frozen=True)
class Stage:
    """One node of a graph among the others; other nodes are given by index.

    Attributes:
        node: the call.
        consumers: calls that take its output.
        waits_for: calls that must have finished all rows before this one begins. Any other
            call that it takes rows from streams to it, so that both run at the same time.
        takes_turns_with: calls of the same model or colocation group, which use its devices.
        runs_beside: calls that may run at the same time, each on devices of its own.
    """

    node: FlowNode
    consumers: tuple[int, ...]
    waits_for: tuple[int, ...]
    takes_turns_with: tuple[int, ...]
    runs_beside: tuple[int, ...]


def plan_stages(
    graph: FlowGraph, colocation_groups: Sequence[Sequence[str]] = ()
) -> tuple[Stage, ...]:
    """The stages of a graph, in an order that respects every dependency.

    Args:
        graph: the traced flow.
        colocation_groups: names of the models that share devices, one sequence per group.
    """
    waits = _plan_waits(graph)
    nodes = graph.nodes
    stages: list[Stage] = []
    for node in nodes:
        others = [other.index for other in nodes if other.index != node.index]
        turns = {
            other
            for other in others
            if _share_devices(node.model_name, nodes[other].model_name, colocation_groups)
        }
        apart = {o for o in others if o in waits[node.index] or node.index in waits[o]}
        stages.append(
            Stage(
                node,
                tuple(other.index for other in nodes if node.index in other.inputs),
                tuple(sorted(waits[node.index])),
                tuple(sorted(turns)),
                tuple(other for other in others if other not in turns | apart),
            )
        )
    return tuple(stages)


def _plan_waits(graph: FlowGraph) -> list[set[int]]:
    """For each node, those that have finished before it begins."""
    ancestors: list[set[int]] = []
    waits: list[set[int]] = []
    for node in graph.nodes:
        sources = [index for index in node.inputs if index != ROOT]
        is_whole_batch = node.method_name == TRAIN_METHOD
        finished = {*node.after, *(sources if is_whole_batch else ())}
        above = {*sources, *node.after}
        ancestors.append(above.union(*(ancestors[index] for index in above)))
        earlier = [ancestors[index] for index in finished] + [waits[index] for index in sources]
        waits.append(finished.union(*earlier))
    return waits


def _share_devices(one: str, other: str, colocation_groups: Sequence[Sequence[str]]) -> bool:
    return one == other or any(one in group and other in group for group in colocation_groups)
