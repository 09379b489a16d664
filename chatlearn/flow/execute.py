"""Runs a traced flow over rows: stages stream micro-batches to each other as soon as they can.

Driver side. Only row ids and handles pass through the driver; the rows themselves go from worker
to worker. A call's inputs are joined by row id in the worker, so replica counts and batch sizes
may differ freely along the flow.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.data.balance import Limits, RowLoad, cut_batch
from chatlearn.flow.graph import ROOT
from chatlearn.flow.node_queue import NodeQueue
from chatlearn.flow.sources import RowSource, RowSources
from chatlearn.flow.stage import StageCall, TrainCall, run_stage, run_train

if TYPE_CHECKING:
    from chatlearn.data.rows import RowId
    from chatlearn.flow.call_loop import CallLoop
    from chatlearn.flow.graph import FlowGraph, FlowNode
    from chatlearn.flow.lanes import Lane, LanePool
    from chatlearn.flow.stage import StageReport
    from chatlearn.runtime.contract import PendingCall, RemoteValue

logger = logging.getLogger(__name__)

__all__ = ["FlowRun", "FlowSettings", "RowSource", "StageRecord"]

TRAIN_METHOD = "train_step"


@dataclass(frozen=True)
class StageRecord:
    """One finished call, for metrics and the timeline.

    Attributes:
        flow_name: name of the flow.
        model_name: the model.
        method_name: its method.
        lane: label of the lane that ran it.
        report: what the worker told.
        position: where the call stands in the flow: whether its rows go into a returned value,
            and the index of its node. What two calls both give is, in the end, the greater's.
        row_ids: its rows.
        node_index: its node in the flow; None for what the engine does besides.
    """

    flow_name: str
    model_name: str
    method_name: str
    lane: str
    report: StageReport
    position: tuple[bool, int] = (False, 0)
    row_ids: Sequence[RowId] = ()
    node_index: int | None = None


@dataclass(frozen=True)
class FlowSettings:
    """How a flow is cut into calls.

    Attributes:
        batch_sizes: rows of one call, by model; None or absent: a share for each lane, of the
            tokens that are known, else of the rows.
        train_limits: of one micro-batch of a training call.
        prompt_sharers: models that compute a prompt once for the rows of one micro-batch.
        is_deterministic: compose batches by row id, not by arrival.
        iteration: what modules get as `iteration` in training calls.
        num_batches: global batches that the episode trains on, all epochs together.
    """

    batch_sizes: Mapping[str, int | None]
    train_limits: Limits = Limits(rows=1)
    prompt_sharers: frozenset[str] = frozenset()
    is_deterministic: bool = False
    iteration: int = 0
    num_batches: int = 1


class FlowRun:
    """One pass of a set of rows through one flow; attach it to a CallLoop to make it move.

    Args:
        graph: the traced flow.
        rows: the raw batch: for each row, in order, where its values lie.
        loop: carries the calls.
        pool: free lanes of every model.
        settings: how to cut.
        on_row: called with a row and its sources once every returned value holds it.
        on_stage: called with every finished call.
    """

    def __init__(
        self,
        graph: FlowGraph,
        rows: Mapping[RowId, tuple[RowSource, ...]],
        loop: CallLoop,
        pool: LanePool,
        settings: FlowSettings,
        on_row: Callable[[RowId, tuple[RowSource, ...]], None] = lambda _row, _sources: None,
        on_stage: Callable[[StageRecord], None] = lambda _record: None,
    ) -> None:
        self._graph = graph
        self._rows = rows
        self._loop = loop
        self._pool = pool
        self._settings = settings
        self._on_row = on_row
        self._on_stage = on_stage
        self._sources = RowSources(rows, len(graph.nodes))
        self._samples_per_prompt = max(Counter(row.prompt for row in rows).values(), default=1)
        self._queues = [self._build_queue(node) for node in graph.nodes]
        self._returned = graph.returned_nodes()
        self._planned: dict[int, tuple[TrainCall, ...]] = {}
        # Calls whose worker was lost, by node; they are made again as they were.
        self._lost: dict[int, list[StageCall]] = {}
        self._outputs_missing = dict.fromkeys(rows, len(graph.outputs))

    @property
    def is_done(self) -> bool:
        """Whether every call of the flow has finished."""
        return all(queue.is_finished for queue in self._queues)

    def needs(self, model_name: str) -> bool:
        """Whether calls of a model are still to come or running."""
        pairs = zip(self._graph.nodes, self._queues, strict=True)
        return any(node.model_name == model_name and not q.is_finished for node, q in pairs)

    def finished_rows(self, node_index: int) -> int:
        """Rows that a node has finished (for progress)."""
        return self._queues[node_index].num_finished

    def pump(self) -> None:
        """Dispatch whatever has its inputs and a free lane, upstream nodes first."""
        for node, queue in zip(self._graph.nodes, self._queues, strict=True):
            if not all(self._queues[index].is_finished for index in node.after):
                continue
            if node.method_name == TRAIN_METHOD:
                self._dispatch_training(node, queue)
            else:
                self._dispatch_micro_batches(node, queue)

    def plan_training(self) -> None:
        """Cut the rows for training calls that take the raw batch, before it is their turn."""
        for node in self._graph.nodes:
            if node.method_name == TRAIN_METHOD and set(node.inputs) == {ROOT}:
                self._planned[node.index] = self.train_calls(node, tuple(self._rows))

    def _build_queue(self, node: FlowNode) -> NodeQueue:
        num_lanes = len(self._pool.lanes(node.model_name))
        size = self._settings.batch_sizes.get(node.model_name)
        spread = None
        if node.method_name == TRAIN_METHOD:
            batch_size = len(self._rows)
        elif size is not None:
            batch_size = _whole_prompts(size, self._samples_per_prompt)
        else:
            batch_size = -(-len(self._rows) // num_lanes)
            if num_lanes > 1 and not self._settings.is_deterministic:
                spread = functools.partial(self._spread, node, num_lanes)
        producers = tuple(sorted({index for index in node.inputs if index != ROOT}))
        return NodeQueue(
            tuple(self._rows),
            len(producers),
            batch_size,
            self._settings.is_deterministic,
            spread,
        )

    def _spread(
        self, node: FlowNode, num_lanes: int, row_ids: Sequence[RowId]
    ) -> list[tuple[RowId, ...]]:
        """What is ready, for every lane a share of its tokens; nothing before there are any.

        A prompt that has no response yet says nothing of the work to come.
        """
        loads = self._sources.loads(node, row_ids)
        if not any(load.response for load in loads.values()):
            return []
        is_shared = node.model_name in self._settings.prompt_sharers
        cut = cut_batch(row_ids, num_lanes, Limits(), loads, shares_prompts=is_shared)
        return [rows for lane in cut for rows in lane if rows]

    def _dispatch_micro_batches(self, node: FlowNode, queue: NodeQueue) -> None:
        lost = self._lost.get(node.index, [])
        while lost or queue.has_batch:
            lane = self._pool.acquire(node.model_name)
            if lane is None:
                return
            if lost:
                again = lost.pop(0)
                self._submit(node, lane, again, again.row_ids)
                continue
            iteration = queue.num_dispatched
            row_ids = queue.take()
            call = StageCall(
                node.method_name,
                row_ids,
                self._sources.inputs(node, row_ids),
                iteration,
                node.constants,
                self._graph.is_used(node.index),
            )
            self._submit(node, lane, call, row_ids)

    def _submit(
        self, node: FlowNode, lane: Lane, call: StageCall, row_ids: tuple[RowId, ...]
    ) -> None:
        calls = lane.group.call(
            run_stage, call, ranks=lane.ranks, num_outputs=2, flow_line=node.line
        )
        output_call = calls[lane.ranks.index(lane.output_rank)]

        def finish() -> None:
            self._pool.release(lane)
            report = self._loop.backend.fetch(output_call, self._loop.stage_timeout_s, output=1)
            self._record(node, lane.label, report, row_ids)
            self._finish_rows(node, row_ids, output_call.outputs[0], report.loads)

        def lose() -> None:
            self._pool.release(lane)
            self._lost.setdefault(node.index, []).append(call)

        self._loop.submit(calls, finish, f"{node.model_name}.{node.method_name}", lose)

    def _dispatch_training(self, node: FlowNode, queue: NodeQueue) -> None:
        if not queue.has_batch:
            return
        lanes = self._pool.acquire_all(node.model_name)
        if lanes is None:
            return
        row_ids = queue.take()
        waiting = len(lanes)
        planned = self._planned.pop(node.index, None) or self.train_calls(node, row_ids)
        for lane, call in zip(lanes, planned, strict=True):
            calls = lane.group.call(run_train, call, ranks=lane.ranks, flow_line=node.line)
            output_call = calls[lane.ranks.index(lane.output_rank)]

            def finish(lane: Lane = lane, output_call: PendingCall = output_call) -> None:
                nonlocal waiting
                report = self._loop.backend.fetch(output_call, self._loop.stage_timeout_s)
                self._record(node, lane.label, report, row_ids)
                waiting -= 1
                if waiting == 0:
                    for each in lanes:
                        self._pool.release(each)
                    queue.finish(len(row_ids))

            self._loop.submit(calls, finish, f"{node.model_name}.{node.method_name}")

    def train_calls(self, node: FlowNode, row_ids: Sequence[RowId]) -> tuple[TrainCall, ...]:
        """The training calls of one global batch, one for each lane of the node's model."""
        lanes = self._pool.lanes(node.model_name)
        loads = self._sources.loads(node, row_ids)
        is_shared = node.model_name in self._settings.prompt_sharers
        cut = cut_batch(
            row_ids, len(lanes), self._settings.train_limits, loads, shares_prompts=is_shared
        )
        num_calls = sum(
            other.model_name == node.model_name and other.method_name == TRAIN_METHOD
            for other in self._graph.nodes
        )
        return tuple(
            TrainCall(
                node.method_name,
                micro_batches,
                self._sources.inputs(
                    node, [r for ids in micro_batches for r in ids] or row_ids[:1]
                ),
                self._settings.iteration,
                row_ids[0],
                node.constants,
                self._settings.num_batches * num_calls,
            )
            for micro_batches in cut
        )

    def _finish_rows(
        self,
        node: FlowNode,
        row_ids: tuple[RowId, ...],
        batch: RemoteValue,
        loads: Sequence[RowLoad],
    ) -> None:
        name = f"{node.model_name}.{node.method_name}#{node.index}"
        self._sources.made[node.index].update(RowSource.of_rows(name, batch, row_ids, loads))
        self._queues[node.index].finish(len(row_ids))
        for consumer, queue in zip(self._graph.nodes, self._queues, strict=True):
            if node.index in consumer.inputs:
                queue.add(row_ids)
        if node.index in self._graph.outputs:
            self._emit(node.index, row_ids)

    def _emit(self, node_index: int, row_ids: tuple[RowId, ...]) -> None:
        for row_id in row_ids:
            self._outputs_missing[row_id] -= self._graph.outputs.count(node_index)
            if self._outputs_missing[row_id] == 0:
                outputs = dict.fromkeys(self._graph.outputs)
                self._on_row(row_id, tuple(self._sources.made[index][row_id] for index in outputs))

    def _record(
        self, node: FlowNode, lane: str, report: StageReport, row_ids: Sequence[RowId]
    ) -> None:
        for warning in report.warnings:
            logger.warning("%s", warning)
        self._on_stage(
            StageRecord(
                self._graph.name,
                node.model_name,
                node.method_name,
                lane,
                report,
                (node.index in self._returned, node.index),
                row_ids,
                node.index,
            )
        )


def _whole_prompts(size: int, num_samples: int) -> int:
    """The most rows up to `size` that hold every sample of their prompts, if there are such."""
    return max(size - size % num_samples, 0) or size
