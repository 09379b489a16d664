"""One pass of the evaluation flow over its whole data set, each row once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import DataError
from chatlearn.flow.execute import FlowRun, StageRecord

if TYPE_CHECKING:
    from chatlearn.data.rows import RowBatch, RowId
    from chatlearn.engine.components import Evaluator
    from chatlearn.engine.prompts import PromptSource
    from chatlearn.engine.session import Session
    from chatlearn.flow.execute import RowSource

__all__ = ["Evaluation", "collect_rows", "run_evaluation"]


@dataclass(frozen=True)
class Evaluation:
    """Results of one evaluation.

    Attributes:
        rows: for each returned model, one dict per row in data-set order.
        metrics: what `Evaluator.post_process` computed.
        records: the calls that were made.
    """

    rows: dict[str, list[dict[str, Any]]]
    metrics: Mapping[str, float]
    records: tuple[StageRecord, ...]


def run_evaluation(
    session: Session,
    evaluator: Evaluator,
    prompts: PromptSource,
    eval_info: Mapping[str, int],
) -> Evaluation:
    """Evaluate every row of the data set once.

    Raises:
        DataError: the flow returns nothing.
    """
    graph = session.plan.flows.evaluator
    if graph is None or not graph.outputs:
        raise DataError("the evaluation flow returns nothing: return what shall be looked at")
    records: list[StageRecord] = []
    sources: dict[RowId, tuple[RowSource, ...]] = {}
    run = FlowRun(
        graph,
        prompts.load_everything(),
        session.loop,
        session.pool,
        session.flow_settings(),
        on_row=sources.__setitem__,
        on_stage=records.append,
    )
    session.run_flow(run)
    order = sorted(sources)
    outputs = dict.fromkeys(graph.outputs)
    rows: dict[str, list[dict[str, Any]]] = {}
    for position, index in enumerate(outputs):
        node = graph.nodes[index]
        chosen = {row_id: sources[row_id][position] for row_id in order}
        name = node.model_name if node.model_name not in rows else f"{node.model_name}#{index}"
        rows[name] = collect_rows(session, chosen)
    return Evaluation(rows, _check_metrics(evaluator.post_process(rows, eval_info)), tuple(records))


def _check_metrics(metrics: Any) -> dict[str, float]:
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise DataError(
            f"Evaluator.post_process gave {type(metrics).__name__}; expected a mapping of metric "
            "names to numbers"
        )
    try:
        named = cast("Mapping[Any, Any]", metrics)
        return {str(name): float(value) for name, value in named.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"Evaluator.post_process: metrics must be numbers: {error}") from error


def collect_rows(session: Session, sources: Mapping[RowId, RowSource]) -> list[dict[str, Any]]:
    """Bring rows to the driver as dicts, in the order of `sources`."""
    fetched: dict[int, dict[RowId, dict[str, Any]]] = {}
    rows: list[dict[str, Any]] = []
    for row_id, source in sources.items():
        key = id(source.batch)
        if key not in fetched:
            batch = cast(
                "RowBatch", session.backend.get(source.batch, session.loop.stage_timeout_s)
            )
            fetched[key] = dict(zip(batch.row_ids, batch.to_rows(), strict=True))
        rows.append(fetched[key][row_id])
    return rows
