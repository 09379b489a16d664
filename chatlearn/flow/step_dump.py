"""Writes down a training step whose numbers went wrong, so that it can be run again. Worker side.

A dump is a folder `dumps/<model>-<number>` of the run: the rows of each lane, what else the step
reads, the model with its optimizer as before the update, and a record. Every rank of the model
takes part; the folder appears as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from chatlearn.checkpoint.background import FileWriter, receipt_name
from chatlearn.checkpoint.plain_values import save_plain
from chatlearn.errors import ChatLearnError

if TYPE_CHECKING:
    from pathlib import Path

    from chatlearn.flow.stage import TrainCall
    from chatlearn.models.faults import NumericFault
    from chatlearn.parallel.context import WorkerContext

__all__ = ["RECORD_FILE", "DumpCounter", "dump_step"]

logger = logging.getLogger(__name__)

RECORD_FILE = "step.json"


@dataclass
class DumpCounter:
    """How many steps a worker has dumped; equal on every rank of a model."""

    count: int = 0

    def close(self) -> None:
        """Nothing is held."""


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
    counter = context.keep("dumps", DumpCounter)
    if not guards.dump or counter.count >= guards.max_dumps:
        return None
    counter.count += 1
    folder = context.module.run_dir / "dumps" / f"{context.model_name}-{counter.count}"
    draft = folder.with_name(f".{folder.name}.partial")
    try:
        _write(context, draft, call, micro_batches, generators)
        if context.rank == 0:
            _write_record(context, draft, call, fault, is_before_update=is_before_update)
        _wait_for_all(context)
        if context.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(draft, folder)
    except (OSError, ChatLearnError) as error:
        logger.warning("the step cannot be dumped: %s", error)
        return None
    return folder


def _write(
    context: WorkerContext,
    draft: Path,
    call: TrainCall,
    micro_batches: list[dict[str, Any]],
    generators: dict[str, Any],
) -> None:
    draft.mkdir(parents=True, exist_ok=True)
    at = context.layout.coordinates(context.rank)
    if context.layout.output_rank(at.dp_rank) == context.rank:
        row_ids = [[tuple(row_id) for row_id in ids] for ids in call.micro_batches]
        content = {
            "row_ids": row_ids,
            "micro_batches": micro_batches,
            "step_state": dict(context.module.step_state(call.micro_batches)),
            "generators": generators,
        }
        where = f"the rows of {context.model_name}"
        save_plain(draft / f"rows.{at.dp_rank}.pt", content, where)
    writer = FileWriter()
    context.module.save_with(writer, draft / "model", call.iteration)
    receipts = draft / ".receipts"
    receipts.mkdir(exist_ok=True)
    name = receipt_name(context.model_name, context.replica, context.rank)
    writer.start(draft, receipts / name, is_async=False)


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


def _wait_for_all(context: WorkerContext) -> None:
    if context.layout.world_size > 1:
        import torch.distributed

        distributed: Any = torch.distributed
        distributed.barrier()
