"""Functions that the engine runs inside workers, besides the flow's stages."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chatlearn.checkpoint.background import FileWriter, receipt_name
from chatlearn.checkpoint.plain_values import load_plain, save_plain
from chatlearn.data.balance import RowLoad, measure_loads
from chatlearn.data.copying import copy_value
from chatlearn.data.rows import RowBatch, RowId
from chatlearn.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatlearn.config import ModelConfig, RuntimeConfig
    from chatlearn.models.base import BaseModule
    from chatlearn.parallel.context import WorkerContext

__all__ = [
    "DatasetSizes",
    "ModuleInfo",
    "RowRequest",
    "SaveOrder",
    "build_datasets",
    "finish_episode",
    "load_rows",
    "load_stale",
    "load_trained",
    "load_worker",
    "mark_start",
    "save_worker",
    "set_up_module",
    "start_episode",
]


@dataclass(frozen=True)
class ModuleInfo:
    """What the engine asks a module once, after setup; see the attributes of `BaseModule`."""

    needs_whole_episode: bool
    shares_prompts: bool


@dataclass(frozen=True)
class SaveOrder:
    """What a worker shall save.

    Attributes:
        draft: the checkpoint's folder.
        iteration: global batches trained on.
        saves_model: the model, too, and not only what is the worker's own.
        is_async: write beside the run's work.
        is_of_start: what is the worker's own as it was when the episode began.
    """

    draft: Path
    iteration: int
    saves_model: bool
    is_async: bool = False
    is_of_start: bool = False


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
    return ModuleInfo(bool(module.needs_whole_episode), bool(module.shares_prompts))


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


def save_worker(context: WorkerContext, order: SaveOrder) -> None:
    """Write this worker's part of a checkpoint; its receipt tells when all of it is there.

    Raises:
        CheckpointError: an earlier save is still being written.
    """
    module = context.module
    writer = context.keep("checkpoint files", FileWriter)
    writer.wait()
    if order.saves_model:
        folder = order.draft / "models" / context.model_name
        module.save_with(writer, folder, order.iteration, is_beside=order.is_async)
    state = _OwnState(module)
    if order.is_of_start:
        state = context.keep("own state", lambda: _OwnState(module))
    where = f"{context.model_name}.worker_state()"
    content = {"generators": state.generators, "module": state.module}
    save_plain(order.draft / _worker_file(context), content, where)
    name = receipt_name(context.model_name, context.replica, context.rank)
    writer.start(order.draft, order.draft / ".receipts" / name, is_async=order.is_async)


def load_trained(context: WorkerContext, checkpoint: Path) -> None:
    """Take a trained model's weights from a checkpoint, with its optimizer."""
    context.module.resume_checkpoint(_model_folder(checkpoint, context))


def load_stale(context: WorkerContext, checkpoint: Path, version: int) -> None:
    """Take weights from a checkpoint that are older than the trainer's; `version`: their number."""
    context.module.load_checkpoint(_model_folder(checkpoint, context))
    context.module.after_weight_sync(version)
    context.weights_version = version


def load_worker(context: WorkerContext, checkpoint: Path) -> bool:
    """Put back what belongs to this worker alone; False where it was not there before."""
    path = checkpoint / _worker_file(context)
    if not path.is_file():
        return False
    state = load_plain(path)
    try:
        generators, own = state["generators"], state["module"]
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is not the state of a worker") from error
    context.module.restore_generators(generators)
    context.module.restore_worker_state(own)
    return True


class _OwnState:
    """What belongs to a worker alone, as it is now: its random generators, and what it adds."""

    def __init__(self, module: BaseModule) -> None:
        self.generators = module.read_generators()
        self.module = module.worker_state()
        # What cannot be copied cannot be saved either: that says which entry it is.
        with suppress(TypeError):
            self.module = copy_value(self.module)

    def close(self) -> None:
        """Nothing is held."""


def mark_start(context: WorkerContext) -> None:
    """Remember what is the worker's own, for a checkpoint that leaves this episode out."""
    context.drop("own state")
    context.keep("own state", lambda: _OwnState(context.module))


def _model_folder(checkpoint: Path, context: WorkerContext) -> str:
    return str(checkpoint / "models" / context.model_name)


def _worker_file(context: WorkerContext) -> str:
    return f"workers/{context.model_name}.r{context.replica}.{context.rank}.pt"
