"""Writes down a training step whose numbers went wrong, so that it can be run again. Worker side.

A dump is a folder `dumps/<model>-<number>` of the run: the rows of each lane, what else the step
reads, the model with its optimizer as before the update, and a record. Every rank of the model
takes part; the folder appears as a whole.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
from typing import TYPE_CHECKING, Any, cast

from chatlearn.checkpoint.background import FileWriter
from chatlearn.checkpoint.plain_values import save_plain
from chatlearn.config.secrets import hide_in_config
from chatlearn.errors import ChatLearnError, in_one_line
from chatlearn.flow.faults import largest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from chatlearn.flow.stage import TrainCall
    from chatlearn.models.faults import NumericFault
    from chatlearn.parallel.context import WorkerContext

__all__ = ["RECORD_FILE", "dump_step"]

logger = logging.getLogger(__name__)

RECORD_FILE = "step.json"


def dump_step(
    context: WorkerContext,
    call: TrainCall,
    micro_batches: list[dict[str, Any]],
    fault: NumericFault,
    generators: dict[str, Any],
    *,
    is_before_update: bool,
) -> Path | None:
    """Write a step down; every rank of the model calls it at the same point.

    Nothing is written beside the run's work: the run may be about to end, and a checkpoint that
    is being written has the use of the copies. What goes wrong on one rank, all ranks hear of
    before the next step that needs them all.

    Args:
        context: of the worker.
        call: the step.
        micro_batches: this lane's part of its rows.
        fault: why.
        generators: the random generators as they were before the step.
        is_before_update: the model has not been changed by this step yet.

    Returns:
        The dump's folder; None where there are enough of them, or it cannot be written.
    """
    guards = context.module.runtime_args.guards
    if not guards.dump:
        return None
    dumps = context.module.run_dir / "dumps"
    number = 1 + int(largest(context, _find_last(dumps, context)))
    if number > guards.max_dumps:
        return None
    folder = dumps / f"{context.model_name}-{number}"
    draft = folder.with_name(f".{folder.name}.partial")
    parts: tuple[Callable[[], None], ...] = (
        lambda: _write_rows(context, draft, call, micro_batches, generators),
        lambda: _write_model(context, draft, call.iteration),
        lambda: _finish(context, draft, folder, call, fault, is_before_update=is_before_update),
    )
    if all(_succeeds_everywhere(context, draft, part) for part in parts):
        return folder
    if context.rank == 0:
        # Another rank may have removed it while this one was writing.
        shutil.rmtree(draft, ignore_errors=True)
    return None


def _succeeds_everywhere(context: WorkerContext, draft: Path, part: Callable[[], None]) -> bool:
    """Do a part of the dump; False on every rank where it failed on one of them."""
    has_failed = False
    try:
        part()
    except Exception as error:  # noqa: BLE001 - a dump that fails must not be what ends the run
        logger.warning("the step cannot be dumped: %s", in_one_line(error))
        # Also tells a rank that waits for files of this one.
        shutil.rmtree(draft, ignore_errors=True)
        has_failed = True
    return not largest(context, float(has_failed))


def _find_last(dumps: Path, context: WorkerContext) -> int:
    """The highest number of a dump of this model that is there, from an earlier try, too."""
    if context.rank == 0:
        for draft in dumps.glob(f".{context.model_name}-*.partial"):
            shutil.rmtree(draft, ignore_errors=True)
    names = [path.name.removeprefix(f"{context.model_name}-") for path in dumps.glob("*-*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def _write_rows(
    context: WorkerContext,
    draft: Path,
    call: TrainCall,
    micro_batches: list[dict[str, Any]],
    generators: dict[str, Any],
) -> None:
    draft.mkdir(parents=True, exist_ok=True)
    at = context.layout.coordinates(context.rank)
    if context.layout.output_rank(at.dp_rank) != context.rank:
        return
    content = {
        "row_ids": [[tuple(row_id) for row_id in ids] for ids in call.micro_batches],
        "micro_batches": micro_batches,
        "step_state": dict(context.module.step_state(call.micro_batches)),
        "generators": generators,
    }
    save_plain(draft / f"rows.{at.dp_rank}.pt", content, f"the rows of {context.model_name}")


def _write_model(context: WorkerContext, draft: Path, iteration: int) -> None:
    writer = FileWriter()
    context.module.save_with(writer, draft / "model", iteration, is_beside=False)
    writer.run(draft)


def _finish(
    context: WorkerContext,
    draft: Path,
    folder: Path,
    call: TrainCall,
    fault: NumericFault,
    *,
    is_before_update: bool,
) -> None:
    """Add the record and show the dump; rank 0's part."""
    if context.rank == 0:
        _write_record(context, draft, call, fault, is_before_update=is_before_update)
        os.replace(draft, folder)


def _write_record(
    context: WorkerContext,
    draft: Path,
    call: TrainCall,
    fault: NumericFault,
    *,
    is_before_update: bool,
) -> None:
    kind = cast("Any", type(context.module))
    record = {
        "format": 1,
        "model": context.model_name,
        "module": f"{kind.__module__}:{kind.__qualname__}",
        "program": _find_program(kind),
        "args": _plain_arguments(context.module.args),
        "method": call.method_name,
        "iteration": call.iteration,
        "num_updates": call.num_updates,
        "constants": dict(call.constants),
        "num_lanes": context.layout.dp_size,
        "is_before_update": is_before_update,
        "fault": {"name": fault.name, "value": repr(fault.value), "text": fault.text},
    }
    try:
        text = json.dumps(record, indent=1)
    except TypeError as error:
        raise ChatLearnError(f"the step's options cannot be written: {error}") from error
    (draft / RECORD_FILE).write_text(text, encoding="utf-8")
    shutil.copyfile(context.module.run_dir / "config.yaml", draft / "config.yaml")


def _plain_arguments(arguments: dict[str, Any]) -> Any:
    """A module's arguments without secrets, as the config has them; None: no text can hold them."""
    hidden = hide_in_config(arguments)
    try:
        json.dumps(hidden)
    except (TypeError, ValueError):
        return None
    return hidden


def _find_program(kind: Any) -> str | None:
    """The file of a class that a program defines itself, where no import finds it."""
    if kind.__module__ != "__main__":
        return None
    for name in kind.__dict__:
        code: Any = getattr(inspect.unwrap(getattr(kind, name)), "__code__", None)
        if code is not None:
            return os.path.abspath(code.co_filename)
    return None
