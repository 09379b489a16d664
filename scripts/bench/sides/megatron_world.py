"""One Megatron module in a world of one rank, without an engine."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from chatlearn.config import load_config
from chatlearn.data.rows import RowId
from chatlearn.engine.worker_calls import set_up_module
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.process_world import WorkerIdentity, join_world
from megatron_adapters.model_config import build_settings
from megatron_adapters.precision import with_precision

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from megatron_adapters import PolicyTrainer
    from megatron_adapters.modules.base import MegatronModule
    from scripts.bench.workload import Row, Shape

__all__ = ["count_parameters", "resolve_dtype", "set_up_alone", "train_once"]

ModuleT = TypeVar("ModuleT", bound="MegatronModule")


def set_up_alone(
    module: ModuleT, fields: Mapping[str, Any], runtime: Mapping[str, Any] | None = None
) -> ModuleT:
    """Build the module's model in this process, as a worker of one rank does.

    Args:
        module: not set up yet.
        fields: `models.<name>`'s.
        runtime: the section `runtime`.
    """
    config = load_config({"models": {module.name: dict(fields)}, "runtime": dict(runtime or {})})
    layout = ParallelLayout()
    identity = WorkerIdentity(
        module.name, 0, 0, layout, "127.0.0.1", "local", is_cpu_only=False, timeout_s=60.0
    )
    context = join_world(identity, module, dist.HashStore())
    set_up_module(context, config.model(module.name), config.runtime, Path(tempfile.gettempdir()))
    return module


def resolve_dtype(shape: Shape) -> str:
    """The dtype that a model gets here where its config says nothing."""
    fields = load_config({"models": {"m": shape.as_fields()}}).model("m").megatron
    fields = with_precision(fields, "cpu")
    settings = build_settings("m", fields, ParallelLayout(), torch.device("cpu"))
    return str(settings.transformer.params_dtype).removeprefix("torch.")


def count_parameters(module: MegatronModule) -> int:
    """Elements of the module's weights."""
    return sum(parameter.numel() for chunk in module.model for parameter in chunk.parameters())


def train_once(trainer: PolicyTrainer, step: Sequence[Sequence[Row]]) -> None:
    """One update on the micro-batches of a global batch."""
    numbers = itertools.count()
    trainer.row_ids = [[RowId(next(numbers), 0) for _ in rows] for rows in step]
    trainer.train_step(
        [
            {
                "prompt_token_ids": [torch.tensor(row.prompt) for row in rows],
                "response_token_ids": [torch.tensor(row.response) for row in rows],
            }
            for rows in step
        ]
    )
