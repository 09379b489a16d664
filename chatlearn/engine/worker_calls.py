"""Functions that the engine runs inside workers, besides the flow's stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatlearn.data.balance import RowLoad, measure_loads
from chatlearn.data.rows import RowBatch, RowId
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatlearn.config import ModelConfig, RuntimeConfig
    from chatlearn.parallel.context import WorkerContext

__all__ = [
    "DatasetSizes",
    "ModuleInfo",
    "RowRequest",
    "build_datasets",
    "finish_episode",
    "load_rows",
    "save_module",
    "set_up_module",
    "start_episode",
]


@dataclass(frozen=True)
class ModuleInfo:
    """What the engine asks a module once, after setup."""

    needs_whole_episode: bool


@dataclass(frozen=True)
class RowRequest:
    """One row to read: from which data set, which entry, under which identity."""

    dataset_index: int
    index: int
    row_id: RowId


@dataclass(frozen=True)
class DatasetSizes:
    """How large data sets are.

    Attributes:
        lengths: of each.
        num_dropped: prompts that the module left out, of all together.
    """

    lengths: tuple[int, ...]
    num_dropped: int


class _Datasets:
    """Data sets that a module has built, kept in its worker."""

    def __init__(self, datasets: Sequence[Sequence[Any]]) -> None:
        self.datasets = datasets

    def close(self) -> None:
        """Forget them."""
        self.datasets = ()


def set_up_module(
    context: WorkerContext,
    module_args: ModelConfig,
    runtime_args: RuntimeConfig,
    run_dir: Path,
) -> ModuleInfo:
    """Attach the module to this worker, build its model, and load what the config names."""
    module = context.module
    module.attach(context, module_args, runtime_args, run_dir)
    module.initialize()
    module.setup()
    if module_args.load is not None:
        module.load_checkpoint(module_args.load)
    return ModuleInfo(needs_whole_episode=bool(module.needs_whole_episode))


def build_datasets(
    context: WorkerContext, key: str, prompts: Sequence[Sequence[Any]], is_eval: bool
) -> DatasetSizes:
    """Let the module make its data sets of the user's prompts; gives their sizes.

    Raises:
        DataError: `build_dataset` gave something that has no length or is empty.
    """
    built: list[Any] = []
    for part in prompts:
        dataset = context.module.build_dataset(part, is_eval)
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise DataError(
                f"{context.model_name}.build_dataset gave {type(dataset).__name__}; expected a "
                "sequence or a torch Dataset with __len__ and __getitem__"
            )
        if len(dataset) == 0:
            raise DataError(f"{context.model_name}.build_dataset gave an empty data set")
        built.append(dataset)
    context.drop(("datasets", key))
    context.keep(("datasets", key), lambda: _Datasets(built))
    return DatasetSizes(
        tuple(len(dataset) for dataset in built),
        sum(int(getattr(dataset, "num_dropped", 0)) for dataset in built),
    )


def load_rows(
    context: WorkerContext, key: str, requests: Sequence[RowRequest]
) -> tuple[RowBatch, tuple[RowLoad, ...]]:
    """Read rows of a data set that `build_datasets` made; gives them and their loads.

    The driver looks at the last output of a call only, so that the rows stay with the workers.
    """
    kept = context.keep(("datasets", key), lambda: _Datasets(()))
    rows = [kept.datasets[request.dataset_index][request.index] for request in requests]
    try:
        batch = RowBatch.from_rows([request.row_id for request in requests], rows)
    except DataError as error:
        raise DataError(f"rows of {context.model_name}.build_dataset: {error}") from error
    return batch, measure_loads(batch.columns)


def start_episode(context: WorkerContext) -> None:
    """The user's `before_episode`."""
    context.module.before_episode()


def finish_episode(context: WorkerContext) -> Mapping[str, float]:
    """The user's `after_episode`; gives the metrics logged there."""
    context.module.after_episode()
    return context.module.take_metrics()


def save_module(context: WorkerContext, folder: Path, iteration: int) -> None:
    """Save the module under `folder` (one folder for all its ranks)."""
    context.module.checkpoint_dir = folder
    context.module.save_checkpoint(iteration)
