"""What runs inside a worker for one call of a flow: join the inputs, call the method, report.

These functions are handed to `WorkerGroup.call`; remote values in their records are resolved
before they run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from chatlearn.data.balance import RowLoad, measure_loads
from chatlearn.data.rows import NamedInput, RowBatch, RowId, is_same_content, join_inputs
from chatlearn.errors import DataError, NumericsError, SyncError
from chatlearn.flow.faults import agree_on_fault, find_weight_fault
from chatlearn.flow.step_dump import dump_step
from chatlearn.metrics.means import mean_of_numbers
from chatlearn.models.faults import NumericFault, find_fault
from chatlearn.models.invoke import invoke, invoke_prepare_episode

if TYPE_CHECKING:
    from pathlib import Path

    from chatlearn.parallel.context import WorkerContext
    from chatlearn.runtime.contract import RemoteValue

__all__ = [
    "StageCall",
    "StageInput",
    "StageReport",
    "TrainCall",
    "prepare_episode",
    "run_stage",
    "run_train",
    "wants_whole_episode",
]


@dataclass(frozen=True)
class StageInput:
    """One input of a call: its producer's name and the batches that hold the rows."""

    producer: str
    batches: Sequence[RemoteValue | RowBatch]


@dataclass(frozen=True)
class StageCall:
    """One micro-batch of one flow node; `is_used`: somebody takes its output."""

    method_name: str
    row_ids: tuple[RowId, ...]
    inputs: Sequence[StageInput]
    iteration: int
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    is_used: bool = True


@dataclass(frozen=True)
class TrainCall:
    """One global batch of one lane: its micro-batches (perhaps empty ones) in order.

    `sample_row` is in every input, also where the lane has no rows: it shows the columns.
    `num_updates` is how many updates the model makes in the whole episode.
    """

    method_name: str
    micro_batches: tuple[tuple[RowId, ...], ...]
    inputs: Sequence[StageInput]
    iteration: int
    sample_row: RowId
    constants: Mapping[str, Any] = field(default_factory=dict[str, Any])
    num_updates: int = 1


@dataclass(frozen=True)
class StageReport:
    """What the driver learns of a call besides its rows.

    Attributes:
        start_s: when the method began, seconds since the epoch.
        end_s: when it returned.
        num_rows: rows of the call.
        metrics: metrics by name, as the module gave them.
        row_statistics: means over the call's rows of what the method added or changed, by name.
        loads: tokens of each row that was given back; empty where rows have no token ids.
        warnings: what a person should know.
    """

    start_s: float
    end_s: float
    num_rows: int
    metrics: Mapping[str, float]
    row_statistics: Mapping[str, float]
    loads: tuple[RowLoad, ...] = ()
    warnings: tuple[str, ...] = ()


def run_stage(context: WorkerContext, call: StageCall) -> tuple[RowBatch | None, StageReport]:
    """Run one micro-batch; only the lane's output rank gives rows back.

    Raises:
        DataError: inputs that do not fit together, or an output that is not as many rows.
        SyncError: the module's weights are half new, since a sync did not finish.
    """
    if context.unusable_reason:
        raise SyncError(f"{context.unusable_reason}: they are not used before the next full sync")
    batch = _join(call.row_ids, call.inputs)
    producer = f"{context.model_name}.{call.method_name}"
    done = _call_method(context, call, batch.collate(), call.row_ids)
    output = done.output
    metrics = context.module.take_metrics()
    if not _is_output_rank(context):
        return None, StageReport(done.start_s, done.end_s, len(batch), {}, {})
    if output is None and not call.is_used:
        output = {}
    rows = RowBatch.from_output(call.row_ids, output, producer)
    statistics, loads = _row_statistics(rows, batch), measure_loads(rows.columns)
    if context.profiler is not None:
        # A method that scores gives no tokens back.
        context.profiler.add_tokens(max(_total(loads), _total(measure_loads(batch.columns))))
    report = StageReport(done.start_s, done.end_s, len(batch), metrics, statistics, loads)
    return rows, report


def run_train(context: WorkerContext, call: TrainCall) -> StageReport:
    """Run one global batch of this lane through a training method."""
    micro_batches = _cut(call)
    module = context.module
    module.num_updates = call.num_updates
    generators = module.read_generators()

    def dump(fault: NumericFault, *, is_before_update: bool = True) -> None:
        folder = dump_step(
            context, call, micro_batches, fault, generators, is_before_update=is_before_update
        )
        if folder is not None:
            dumps.append(folder)

    dumps: list[Path] = []
    module.on_fault = dump
    try:
        done = _call_method(context, call, micro_batches, [list(ids) for ids in call.micro_batches])
    except NumericsError as error:
        raise NumericsError(f"{error}{_tell_dumps(dumps)}") from error
    finally:
        module.on_fault = None
    context.weights_version += 1
    result = done.output
    _count_tokens(context, micro_batches)
    metrics = dict(context.module.take_metrics())
    if result is not None:
        if not isinstance(result, Mapping):
            raise DataError(
                f"{context.model_name}.{call.method_name} gave {type(result).__name__}; expected "
                "None or a mapping of metric names to numbers"
            )
        metrics.update(_as_numbers(cast("Mapping[str, Any]", result), context.model_name))
    faults = list(module.take_faults())
    if not faults:
        faults = _heed_metrics(context, metrics, dump, dumps)
    num_rows = sum(map(len, call.micro_batches))
    warnings = tuple(
        f"model {context.model_name!r}: {fault.text} ({fault.action}){_tell_dumps(dumps)}"
        for fault in faults
        if context.rank == 0
    )
    return StageReport(done.start_s, done.end_s, num_rows, metrics, {}, warnings=warnings)


def prepare_episode(context: WorkerContext, calls: Sequence[TrainCall]) -> StageReport:
    """Show a trainer every global batch of the episode before its first update."""
    start_s = time.time()
    batches = [_cut(call) for call in calls]
    row_ids = [[list(ids) for ids in call.micro_batches] for call in calls]
    context.module.num_updates = calls[0].num_updates
    with _profiled(context, "prepare_episode"):
        invoke_prepare_episode(context.module, batches, row_ids)
    end_s = time.time()
    _count_tokens(context, [part for batch in batches for part in batch])
    num_rows = sum(len(ids) for call in calls for ids in call.micro_batches)
    return StageReport(start_s, end_s, num_rows, context.module.take_metrics(), {})


def wants_whole_episode(context: WorkerContext, call: TrainCall) -> bool:
    """Ask a trainer, by the columns of the sample row, whether it will use `prepare_episode`."""
    columns = _join([call.sample_row], call.inputs).columns
    context.module.num_updates = call.num_updates
    return bool(context.module.wants_whole_episode(tuple(columns)))


@dataclass(frozen=True)
class _Done:
    """What a method gave, and when it ran, seconds since the epoch."""

    output: Any
    start_s: float
    end_s: float


def _call_method(
    context: WorkerContext, call: StageCall | TrainCall, data: Any, row_ids: Sequence[Any]
) -> _Done:
    """Call the method that a stage or a training call names."""
    with _profiled(context, call.method_name):
        start_s = time.time()
        output = invoke(
            context.module,
            call.method_name,
            data,
            row_ids=row_ids,
            iteration=call.iteration,
            constants=call.constants,
        )
        return _Done(output, start_s, time.time())


def _profiled(context: WorkerContext, stage: str) -> AbstractContextManager[None]:
    return nullcontext() if context.profiler is None else context.profiler.record(stage)


def _count_tokens(context: WorkerContext, micro_batches: Sequence[Mapping[str, Any]]) -> None:
    """Tell a profiler what a trainer has read; each lane counts once."""
    if context.profiler is not None and _is_output_rank(context):
        context.profiler.add_tokens(sum(_total(measure_loads(part)) for part in micro_batches))


def _total(loads: Sequence[RowLoad]) -> int:
    return sum(load.prompt + load.response for load in loads)


def _join(row_ids: Sequence[RowId], inputs: Sequence[StageInput]) -> RowBatch:
    return join_inputs(row_ids, [_read_input(source) for source in inputs])


def _read_input(source: StageInput) -> NamedInput:
    try:
        batch = RowBatch.concat(cast("Sequence[RowBatch]", source.batches))
    except DataError as error:
        raise DataError(f"rows of {source.producer}: {error}") from error
    return NamedInput(source.producer, batch)


def _cut(call: TrainCall) -> list[dict[str, Any]]:
    row_ids = [row_id for ids in call.micro_batches for row_id in ids]
    batch = _join(row_ids or [call.sample_row], call.inputs)
    return [batch.select(ids).collate() for ids in call.micro_batches]


def _is_output_rank(context: WorkerContext) -> bool:
    at = context.layout.coordinates(context.rank)
    return context.layout.output_rank(at.dp_rank) == context.rank


def _row_statistics(rows: RowBatch, given: RowBatch) -> dict[str, float]:
    """Mean reward and response length, where these columns are the method's own work."""
    statistics: dict[str, float | None] = {}
    if _is_own(rows, given, "rewards"):
        statistics["reward"] = mean_of_numbers(rows.columns["rewards"])
    if _is_own(rows, given, "response_token_ids"):
        responses = rows.columns["response_token_ids"]
        lengths = [len(ids) if hasattr(ids, "__len__") else None for ids in responses]
        statistics["response_length"] = mean_of_numbers(lengths)
    return {name: value for name, value in statistics.items() if value is not None}


def _is_own(rows: RowBatch, given: RowBatch, key: str) -> bool:
    """Whether a method added a column, or gives it back with other content."""
    if key not in rows.columns or key not in given.columns:
        return key in rows.columns
    pairs = zip(rows.columns[key], given.columns[key], strict=True)
    return not all(is_same_content(new, old) for new, old in pairs)


def _as_numbers(metrics: Mapping[str, Any], model_name: str) -> dict[str, float]:
    try:
        return {str(key): float(value) for key, value in metrics.items()}
    except (TypeError, ValueError) as error:
        raise DataError(f"{model_name}: metrics must be numbers: {error}") from error


def _heed_metrics(
    context: WorkerContext,
    metrics: Mapping[str, float],
    dump: Callable[..., None],
    dumps: Sequence[Path],
) -> list[NumericFault]:
    """Look at what a module of a user's own gives: its update is made, so skip means stop.

    Every rank comes here, and all hear of the gravest fault of any, but for a module that looks at
    its numbers itself, which has nothing left to find.

    Raises:
        NumericsError: a loss (any metric whose name ends so), the gradient norm or a weight is not
            finite, or a number is beyond its limit, and that ends the run.
    """
    module = context.module
    guards = module.runtime_args.guards
    fault = find_fault(guards, metrics)
    if not module.guards_updates:
        own = fault or find_weight_fault(guards, module.model)
        fault = agree_on_fault(context, own)
    if fault is None:
        return []
    if not module.guards_updates or context.layout.world_size == 1:
        dump(fault, is_before_update=False)
    if fault.action != "warn":
        raise NumericsError(f"model {context.model_name!r}: {fault.text}{_tell_dumps(dumps)}")
    return [fault]


def _tell_dumps(dumps: Sequence[Path]) -> str:
    return f"; the step is in {dumps[0]}: run `chatlearn replay` on it" if dumps else ""
