"""What the engine costs: an episode's wall time less the critical path of its workers' work."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from chatlearn.flow.graph import ROOT, TRAIN_METHOD
from chatlearn.metrics.critical_path import BusySpan, critical_seconds

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Sequence

    from chatlearn.engine.session import Session
    from chatlearn.flow.execute import StageRecord
    from chatlearn.flow.graph import FlowGraph

__all__ = ["OverheadMeter", "build_meter"]

_ROLLOUT = ("rollout",)


def build_meter(session: Session, *, has_manager: bool) -> OverheadMeter:
    """A meter for the flows of a run, whose first episode begins now."""
    flows, runtime = session.plan.flows, session.config.runtime
    groups = runtime.colocation_groups
    if runtime.backend == "local":
        # One process: every model takes turns with every other.
        groups = (tuple(flows.modules),)
    graphs = (flows.environment, flows.trainer, flows.evaluator)
    return OverheadMeter(graphs, groups, has_manager=has_manager, now_s=time.time())


class OverheadMeter:
    """Collects what the workers did in an episode, with what each piece had to wait for.

    A call waits for the rows that it takes, for its lane, for the models that share its devices,
    and for the calls that its flow orders before it. A training call waits for all lanes of its
    model; the first one for the whole rollout where samples are chosen or shown to a trainer
    beforehand. What the driver, the data set and the hooks around an episode take is overhead.

    Args:
        graphs: the traced flows.
        colocation: groups of models that take turns.
        has_manager: a sample manager chooses what is trained on.
        now_s: when the first episode begins, seconds since the epoch.
    """

    def __init__(
        self,
        graphs: Iterable[FlowGraph | None],
        colocation: Sequence[Sequence[str]],
        *,
        has_manager: bool,
        now_s: float,
    ) -> None:
        self._graphs = {graph.name: graph for graph in graphs if graph is not None}
        self._colocation = colocation
        self._has_manager = has_manager
        self._start_s = now_s
        self._spans: list[BusySpan] = []

    def add_calls(self, records: Iterable[StageRecord]) -> None:
        """Count finished calls of a flow."""
        self._spans += [self._build_span(record) for record in records]

    def add_models(self, start_s: float, end_s: float, models: Iterable[str]) -> None:
        """Count what whole models did together, such as a weight sync or a checkpoint."""
        names = tuple(models)
        needs = [("model", name) for name in names]
        gives = [*needs, *(("whole", name) for name in names)]
        self._spans.append(BusySpan(start_s, end_s, needs, gives))

    def finish(self, now_s: float) -> dict[str, float]:
        """Metrics of the episode that ends now; the next one begins."""
        critical_s, wall_s = critical_seconds(self._spans), now_s - self._start_s
        self._spans, self._start_s = [], now_s
        overhead = 1.0 - critical_s / wall_s if wall_s > 0 else 0.0
        return {"time/critical_path": critical_s, "engine_overhead": overhead}

    def _build_span(self, record: StageRecord) -> BusySpan:
        name, graph = record.model_name, self._graphs[record.flow_name]
        groups = [group for group in self._colocation if name in group]
        partners = sorted({other for group in groups for other in group} - {name})
        needs: list[Hashable] = [("lane", record.lane), ("whole", name)]
        needs += [("model", other) for other in partners]
        gives: list[Hashable] = [("lane", record.lane), ("model", name)]
        is_prepared = record.node_index is None
        if is_prepared or record.method_name == TRAIN_METHOD:
            needs.append(("model", name))
        if is_prepared or (self._has_manager and graph.name == "trainer"):
            needs.append(_ROLLOUT)
        if graph.name == "environment":
            gives.append(_ROLLOUT)
        if record.node_index is not None:
            self._add_rows(record, graph, record.node_index, needs, gives)
        return BusySpan(record.report.start_s, record.report.end_s, needs, gives)

    def _add_rows(
        self,
        record: StageRecord,
        graph: FlowGraph,
        index: int,
        needs: list[Hashable],
        gives: list[Hashable],
    ) -> None:
        flow, node = graph.name, graph.nodes[index]
        needs += [(flow, after) for after in node.after]
        gives.append((flow, index))
        for source in node.inputs:
            if source != ROOT:
                needs += [(flow, source, row_id) for row_id in record.row_ids]
            elif flow == "trainer":
                needs += [("sample", row_id) for row_id in record.row_ids]
        gives += [(flow, index, row_id) for row_id in record.row_ids]
        if flow == "environment" and index in graph.outputs:
            gives += [("sample", row_id) for row_id in record.row_ids]
