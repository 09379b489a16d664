"""Runs a step that was dumped again, alone, in the `local` backend."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.checkpoint.plain_values import load_plain
from chatlearn.config import load_config
from chatlearn.data.rows import RowBatch, RowId
from chatlearn.engine.replayed import Replay
from chatlearn.engine.reward_dump import KIND, replay_rewards
from chatlearn.engine.worker_calls import set_up_module
from chatlearn.errors import CheckpointError, ConfigError, DataError, WorkerError
from chatlearn.flow.stage import StageInput, StageReport, TrainCall, run_train
from chatlearn.flow.step_dump import RECORD_FILE
from chatlearn.models.base import BaseModule
from chatlearn.models.dotted_path import load_object
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.contract import ModelSpec
from chatlearn.runtime.local_backend import LocalBackend
from chatlearn.runtime.placement import PlacementPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatlearn.config import Config
    from chatlearn.parallel.context import WorkerContext

__all__ = ["replay_step"]

# Under this name a program is imported whose class is run again.
_PROGRAM = "chatlearn_replayed_program"
_STEP_FIELDS = (
    *("model", "module", "method", "iteration", "num_updates", "constants", "num_lanes"),
    *("is_before_update", "fault"),
)
# One rank holds the whole model.
_ALONE = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "num_gpu": 1,
    "load": None,
}
_MEGATRON_ALONE = {
    "sequence_parallel": False,
    "num_layers_in_first_pipeline_stage": None,
    "num_layers_in_last_pipeline_stage": None,
    "account_for_embedding_in_pipeline_split": False,
    "account_for_loss_in_pipeline_split": False,
    "pipeline_model_parallel_layout": None,
}


@dataclass(frozen=True)
class _Dump:
    """A dump's record and where it lies."""

    folder: Path
    record: dict[str, Any]


def replay_step(folder: Path, overrides: Sequence[str] = ()) -> Replay:
    """Build the dumped model on one rank, and run the dumped step.

    Args:
        folder: of the dump.
        overrides: `key.path=value` entries for its configuration.

    Raises:
        ConfigError: the folder holds no dump, or its module cannot be found.
        CheckpointError: a file is damaged.
        ChatLearnError: the model cannot be built.
    """
    dump = _Dump(folder, _read_record(folder))
    record = dump.record
    if record.get("kind") == KIND:
        return replay_rewards(folder, record, overrides)
    config = _configure(folder, record["model"], overrides)
    module = _build(record)
    backend = LocalBackend()
    run_dir = Path(tempfile.mkdtemp(prefix="chatlearn-replay-"))
    spec = ModelSpec(record["model"], module, ParallelLayout(), 1)
    try:
        (group,) = backend.start([spec], PlacementPlan((), (), 1, 1, "cpu"), config)[
            record["model"]
        ]
        report, error = None, ""
        try:
            (call,) = group.call(_run_again, dump, config, run_dir)
            report = cast("StageReport", backend.fetch(call, config.runtime.stage_timeout_s))
        except WorkerError as failure:
            if not failure.message.startswith("NumericsError: "):
                raise
            error = failure.message.removeprefix("NumericsError: ")
    finally:
        backend.close()
        shutil.rmtree(run_dir, ignore_errors=True)
    fault = record["fault"]
    return Replay(
        f"model {record['model']!r}",
        fault["text"],
        fault["name"],
        float(fault["value"]),
        report.metrics if report is not None else {},
        error,
        bool(record["is_before_update"]),
        report.warnings if report is not None else (),
    )


def _run_again(context: WorkerContext, dump: _Dump, config: Config, run_dir: Path) -> StageReport:
    """In the worker: set the model up as it was, and run the step."""
    record, module = dump.record, context.module
    # A fault that comes again is told, not dumped.
    guards = config.runtime.guards.model_copy(update={"dump": False})
    runtime = config.runtime.model_copy(update={"guards": guards})
    set_up_module(context, config.model(record["model"]), runtime, run_dir)
    model = dump.folder / "model"
    if model.is_dir() and any(model.iterdir()):
        # A module without a model has saved none.
        module.resume_checkpoint(str(model))
    lanes = [_read_lane(dump.folder, lane) for lane in range(int(record["num_lanes"]))]
    for lane in lanes:
        module.restore_step_state(lane["step_state"])
    module.restore_generators(lanes[0]["generators"])
    micro_batches = [ids for lane in lanes for ids in lane["row_ids"]]
    batches = [batch for lane in lanes for batch in lane["batches"] if len(batch)]
    if not batches:
        raise DataError(f"{dump.folder} holds no rows")
    call = TrainCall(
        record["method"],
        tuple(tuple(ids) for ids in micro_batches),
        (StageInput("the dump", tuple(batches)),),
        int(record["iteration"]),
        next(ids[0] for ids in micro_batches if ids),
        record["constants"],
        int(record["num_updates"]),
    )
    return run_train(context, call)


def _read_lane(folder: Path, lane: int) -> dict[str, Any]:
    path = folder / f"rows.{lane}.pt"
    content = load_plain(path)
    try:
        row_ids = [[RowId(*row_id) for row_id in ids] for ids in content["row_ids"]]
        batches = [
            RowBatch.from_output(tuple(ids), columns, "the dump")
            for ids, columns in zip(row_ids, content["micro_batches"], strict=True)
            if ids
        ]
        return {
            "row_ids": row_ids,
            "batches": batches,
            "step_state": content["step_state"],
            "generators": content["generators"],
        }
    except (KeyError, TypeError, ValueError, DataError) as error:
        raise CheckpointError(f"{path} is not what a step's rows are: {error}") from error


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    try:
        record = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        if record["format"] != 1:
            raise ValueError(f"format {record['format']}")
        needed = _STEP_FIELDS if record.get("kind") != KIND else ("episode", "best", "fault")
        missing = [name for name in needed if name not in record]
        if missing:
            raise ValueError(f"{missing[0]} is missing")
        float(record["fault"]["value"])
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; name a folder below `dumps` of a run"
        ) from error
    return record


def _configure(folder: Path, model: str, overrides: Sequence[str]) -> Config:
    config = load_config(folder / "config.yaml", overrides)
    section = config.model(model)
    megatron = {name: _MEGATRON_ALONE.get(name, value) for name, value in section.megatron.items()}
    alone = section.model_copy(update={**_ALONE, "megatron": megatron})
    runtime = config.runtime.model_copy(update={"backend": "local", "resume": None})
    return config.model_copy(update={"models": {model: alone}, "runtime": runtime})


def _build(record: Mapping[str, Any]) -> BaseModule:
    path: str = record["module"]
    if record.get("program"):
        path = _import_program(record["program"], path)
    kind = load_object(path, "the dump's module")
    if not isinstance(kind, type) or not issubclass(kind, BaseModule):
        raise ConfigError(f"the dump's module {record['module']} is not a subclass of BaseModule")
    if "args" in record and record["args"] is None:
        raise ConfigError(
            f"the dump's module {record['module']} was built with arguments that no file holds: "
            "give it numbers, texts, lists and dicts to make its steps repeatable"
        )
    arguments = [record["args"]] if record.get("args") else []
    try:
        return kind(record["model"], *arguments)
    except TypeError as error:
        raise ConfigError(
            f"the dump's module {record['module']} is not built from a name and its arguments "
            f"alone: {error}"
        ) from error


def _import_program(program: str, path: str) -> str:
    """Import the file of a program whose class is wanted; its `__main__` part does not run."""
    spec = importlib.util.spec_from_file_location(_PROGRAM, program)
    if spec is None or spec.loader is None or not Path(program).is_file():
        raise ConfigError(f"the dump's program {program} is not a Python file that is there")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_PROGRAM] = module
    sys.path.insert(0, str(Path(program).parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(
            f"the dump's program {program} fails when it is imported: "
            f"{type(error).__name__}: {error}; what it runs belongs under "
            "`if __name__ == '__main__':`"
        ) from error
    return f"{_PROGRAM}:{path.partition(':')[2]}"
