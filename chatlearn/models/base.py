"""BaseModule: what users subclass; on the driver a description, in a worker the model itself.

The same object is made in the user's program and pickled into every worker of the model, so a
constructor must be light; `setup` builds what is heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from chatlearn.checkpoint.generators import read_generators, restore_generators
from chatlearn.data.copying import copy_value
from chatlearn.errors import ChatLearnError, FlowError, SyncError
from chatlearn.models.plain_weights import (
    HUGGINGFACE,
    describe_huggingface,
    describe_state_dict,
    load_state,
    read_state,
    state_file_name,
    state_tensors,
    write_state,
)
from chatlearn.models.tracing import STEPS, trace_methods

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from chatlearn.checkpoint.background import FileWriter
    from chatlearn.config import ModelConfig, RuntimeConfig
    from chatlearn.models.faults import NumericFault
    from chatlearn.parallel.context import WorkerContext
    from chatlearn.parallel.layout import ParallelLayout
    from chatlearn.parallel.sharding import TensorShard

__all__ = ["BaseModule", "CompletedConfig"]

AttachedT = TypeVar("AttachedT")


@dataclass(frozen=True)
class CompletedConfig:
    """A model's section of the config with what followed from it.

    Attributes:
        config: the section.
        notes: a line for each thing that a user may want to know.
        tokenizer: one that belongs to the model, where there is one.
    """

    config: ModelConfig
    notes: tuple[str, ...] = ()
    tokenizer: str | None = None


class BaseModule:
    """One model of a flow.

    Users override `setup`, `forward_step`, `train_step`, `eval_step`, `build_dataset`, hooks such
    as `before_episode`, or add methods of their own and call them in a flow. A method that a flow
    calls may also take `iteration`, and options that the flow gives by keyword. A plain module
    holds any torch model in `self.model` and, if it trains, the optimizer in `self.optimizer`.

    Attributes:
        name: the model's name in flows, config and messages.
        args: options of the user's own, given to the constructor.
        model: a torch module, once `setup` has built one.
        optimizer: a torch optimizer, if the module trains.
        scheduler: its learning rate schedule, if there is one; the module steps it.
        row_ids: during a call, the ids of its rows (in `train_step`: a list for each
            micro-batch; in `prepare_episode`: a list of those for each global batch).
        iteration: during a call, how many of its kind came before.
        num_updates: in `wants_whole_episode`, `prepare_episode` and `train_step`: how many updates
            the episode has for this model, all epochs together.
        policy_version: weight syncs received so far.
        needs_whole_episode: a trainer that sets this is shown all of an episode's batches, by
            `prepare_episode`, before its first update (see `wants_whole_episode`).
        guards_updates: the module looks at its numbers before an update (`report_fault`).
        shares_prompts: a micro-batch computes a prompt once; tokens count so. Read after `setup`.
        weight_naming: what the names in `weight_shards` are: `state_dict`, the model's own names;
            `huggingface`, for a `transformers` model in `self.model`, so that a model with
            another naming can sync with it. A backend has its own.
        left_out_weights: tensors of its trainer that this model does without, as patterns of
            `fnmatch` for their names in the sync, such as `("value_head.*",)`.
    """

    needs_whole_episode: bool = False
    guards_updates: bool = False
    shares_prompts: bool = False
    weight_naming: str = "state_dict"
    left_out_weights: tuple[str, ...] = ()

    def __init__(self, name: str, args: Mapping[str, Any] | None = None) -> None:
        if not isinstance(name, str) or not name.isidentifier():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise FlowError(
                f"got the model name {name!r:.60}; expected an identifier such as 'policy': it is "
                "a key of the config"
            )
        self.name = name
        self.args = dict(args or {})
        self.model: Any = None
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.row_ids: Any = ()
        self.iteration = 0
        self.num_updates = 0
        self.policy_version = 0
        self._context: WorkerContext | None = None
        self._module_args: ModelConfig | None = None
        self._runtime_args: RuntimeConfig | None = None
        self._run_dir: Path | None = None
        self._checkpoint_dir: Path | None = None
        self.on_fault: Callable[[NumericFault], None] | None = None
        self._file_writer: FileWriter | None = None
        self._is_beside = False
        self._faults: list[NumericFault] = []
        self._metrics: dict[str, float] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        trace_methods(cls)

    # What users override.

    def setup(self) -> None:
        """Build the model; runs once in every worker, after its process world is up."""

    def forward_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Inference on one micro-batch.

        Args:
            data: columns of the rows; tensors [rows, ...] where shapes agree, lists elsewhere.

        Returns:
            Columns with as many rows, in the same order.
        """
        raise self._missing("forward_step")

    def train_step(self, data: list[dict[str, Any]]) -> Mapping[str, float] | None:
        """One update on this rank's part of a global batch.

        Args:
            data: its micro-batches, each like the argument of `forward_step`; some may have no
                rows (empty lists), so that every rank has equally many.

        Returns:
            Metrics by name, or None.
        """
        raise self._missing("train_step")

    def eval_step(self, data: dict[str, Any]) -> dict[str, Any]:
        """Evaluation of one micro-batch; like `forward_step`."""
        raise self._missing("eval_step")

    def build_dataset(self, prompts: Sequence[Any], is_eval: bool = False) -> Sequence[Any]:
        """Rows of the data set: one mapping per prompt (a torch Dataset serves, too).

        The default passes mappings through and turns anything else into `{"prompt": x}`.
        """
        return [
            dict(cast("Mapping[str, Any]", p)) if isinstance(p, Mapping) else {"prompt": p}
            for p in prompts
        ]

    def save_checkpoint(self, iteration: int) -> None:
        """Save the model under `self.checkpoint_dir`; every rank calls it.

        The default saves `self.model`, `self.optimizer` and `self.scheduler`, one file for each
        rank of the first data-parallel copy. What takes long can be a job of `write_files`.

        Args:
            iteration: global batches trained on so far.
        """
        if self.model is not None and self.data_parallel_rank == 0:
            path = self.checkpoint_dir / state_file_name(self.layout, self.rank)
            state = read_state(self.model, self.optimizer, iteration, self.scheduler)
            if self.writes_beside:
                state = copy_value(state)
            self.write_files(lambda: [write_state(path, state)])

    def resume_checkpoint(self, folder: str) -> None:
        """Go on from what `save_checkpoint` saved; every rank; the default is `load_checkpoint`."""
        self.load_checkpoint(folder)

    def worker_state(self) -> Mapping[str, Any]:
        """What else of this worker a resumed run needs; goes into every checkpoint.

        Tensors, arrays, numbers, texts, and containers of them; the default has none. Weights,
        optimizer, schedule and the global random generators are saved without it.
        """
        return {}

    def restore_worker_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `worker_state` gave."""

    def before_episode(self) -> None:
        """Called on every worker when an episode begins."""

    def after_episode(self) -> None:
        """Called on every worker when an episode has ended."""

    # What users may call or read inside a worker.

    @property
    def context(self) -> WorkerContext:
        """The worker this module lives in; an error on the driver."""
        return self._attached(self._context)

    @property
    def layout(self) -> ParallelLayout:
        """Parallel layout of this replica."""
        return self.context.layout

    @property
    def rank(self) -> int:
        """Rank within the replica's process world."""
        return self.context.rank

    @property
    def replica_id(self) -> int:
        """Which replica of the model this is, from 0."""
        return self.context.replica

    @property
    def device(self) -> torch.device:
        """Where tensors belong."""
        return self.context.device

    @property
    def data_parallel_rank(self) -> int:
        """This rank's position among those with the same shard."""
        return self.layout.coordinates(self.rank).dp_rank

    @property
    def data_parallel_size(self) -> int:
        """Number of ranks with the same shard, over which a global batch is spread."""
        return self.layout.dp_size

    @property
    def data_parallel_group(self) -> ProcessGroup | None:
        """Ranks with the same shard as this one; None where there is only this one."""
        return self.context.data_parallel_group

    @property
    def module_args(self) -> ModelConfig:
        """This model's section of the config."""
        return self._attached(self._module_args)

    @property
    def runtime_args(self) -> RuntimeConfig:
        """The config's runtime section."""
        return self._attached(self._runtime_args)

    @property
    def model_args(self) -> dict[str, Any]:
        """Megatron's fields, `models.<name>.args` and the constructor's `args`; later wins."""
        return {**self.module_args.megatron, **self.module_args.args, **self.args}

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self._attached(self._run_dir)

    @property
    def checkpoint_dir(self) -> Path:
        """Where `save_checkpoint` writes; the framework sets it for each checkpoint."""
        return self._attached(self._checkpoint_dir)

    @checkpoint_dir.setter
    def checkpoint_dir(self, folder: Path) -> None:
        self._checkpoint_dir = folder

    def is_last_rank(self) -> bool:
        """Whether this is the replica's last rank."""
        return self.rank == self.layout.world_size - 1

    def step_state(self, micro_batches: Sequence[Sequence[Any]]) -> Mapping[str, Any]:
        """What `train_step` reads besides rows, weights and optimizer; for a dump of the step.

        Args:
            micro_batches: ids of the step's rows.
        """
        del micro_batches
        return {}

    def restore_step_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `step_state` gave, before the step is run again."""

    def report_fault(self, fault: NumericFault) -> None:
        """Tell of a number that is wrong, within `train_step` and before the update.

        Every rank has to come to the same fault. The step is dumped, and the driver told.
        """
        self._faults.append(fault)
        if self.on_fault is not None:
            self.on_fault(fault)

    def take_faults(self) -> tuple[NumericFault, ...]:
        """What was reported since the last time, and forget it."""
        taken, self._faults = tuple(self._faults), []
        return taken

    def write_files(self, job: Callable[[], Iterable[Path] | None]) -> None:
        """Within `save_checkpoint`: run a job that writes files of the checkpoint.

        It runs once `save_checkpoint` has returned, beside the run's work where `writes_beside`
        says so; then it must not read what training changes, nor `self.checkpoint_dir`. Outside a
        save it runs at once.

        Args:
            job: writes, and may give the files' paths, which are then read for their checksums
                here and not by the driver.
        """
        if self._file_writer is None:
            job()
        else:
            self._file_writer.submit(job)

    @property
    def writes_beside(self) -> bool:
        """Whether jobs of `write_files` run while training goes on."""
        return self._file_writer is not None and self._is_beside

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Report numbers; the driver averages them over calls, weighted by rows."""
        self._metrics.update({name: float(value) for name, value in metrics.items()})

    # What the framework calls; a backend such as the Megatron module overrides some.

    def save_with(
        self, writer: FileWriter, folder: Path, iteration: int, *, is_beside: bool
    ) -> None:
        """Call `save_checkpoint` for a folder; jobs go to the writer, beside training or not."""
        self._checkpoint_dir = folder
        self._file_writer, self._is_beside = writer, is_beside
        try:
            self.save_checkpoint(iteration)
        finally:
            self._file_writer, self._is_beside = None, False

    def read_generators(self) -> dict[str, Any]:
        """States of the random generators that this worker draws from."""
        return read_generators()

    def restore_generators(self, states: Mapping[str, Any]) -> None:
        """Put back what `read_generators` gave."""
        restore_generators(states)

    def attach(
        self,
        context: WorkerContext,
        module_args: ModelConfig,
        runtime_args: RuntimeConfig,
        run_dir: Path,
    ) -> None:
        """Bind this object to the worker that it lives in."""
        self._context = context
        self._module_args = module_args
        self._runtime_args = runtime_args
        self._run_dir = run_dir
        self._checkpoint_dir = run_dir / "checkpoints" / self.name

    def initialize(self) -> None:
        """Prepare the process for the model; runs after `attach`, before `setup`."""

    def take_metrics(self) -> dict[str, float]:
        """What was logged since the last time, and forget it."""
        taken, self._metrics = self._metrics, {}
        return taken

    def complete_config(self, config: ModelConfig) -> CompletedConfig:
        """Fill in what follows from other entries, on the driver before any worker is up.

        Args:
            config: this model's section of the config.

        Raises:
            ConfigError: an entry cannot be followed, or contradicts what follows from it.
        """
        return CompletedConfig(config)

    def find_problems(self, config: ModelConfig, layout: ParallelLayout) -> Sequence[str]:
        """Why the model cannot be built like this, told on the driver before any worker is up.

        Args:
            config: this model's section of the config.
            layout: of one replica.

        Returns:
            A line for each problem, without the model's name; empty where there is none.
        """
        del config, layout
        return ()

    def planned_weight_shards(
        self, config: ModelConfig, layout: ParallelLayout
    ) -> tuple[tuple[TensorShard, ...], ...] | None:
        """What `weight_shards` will say, by rank, told on the driver before any worker is up.

        Arguments are those of `find_problems`; None where only the live module knows.
        """
        del config, layout
        return None

    def weight_shards(self) -> tuple[TensorShard, ...]:
        """Description of the weights of this rank, for weight sync, in `weight_naming`."""
        if self.weight_naming == HUGGINGFACE:
            return describe_huggingface(self.name, self.model)
        return describe_state_dict(self.name, self.model)

    def weight_shards_in(self, naming: str) -> tuple[TensorShard, ...]:
        """The weights of this rank as `weight_shards` tells them, in another naming.

        Where two models differ in their naming, one of them must know the other's. The shards
        speak of the same local tensors, so nothing is copied or converted.

        Args:
            naming: the `weight_naming` of the other model.

        Raises:
            SyncError: this module does not know the naming.
            ConfigError: it knows it, but the model has weights that have no name there.
        """
        if naming == self.weight_naming:
            return self.weight_shards()
        raise SyncError(
            f"model {self.name!r} cannot tell its weights in the naming {naming!r}, only in "
            f"{self.weight_naming!r}: set weight_naming in {type(self).__name__} if these names "
            "are those, or override weight_shards_in"
        )

    def weight_tensors(self) -> Mapping[str, torch.Tensor]:
        """The live tensors that `weight_shards` speaks of, by local name."""
        return state_tensors(self.name, self.model)

    def frozen_weights(self) -> Collection[str]:
        """Names of `weight_tensors` that training never changes: moved once, not at each sync.

        The default names none; a plain module may give its frozen parameters here.
        """
        return ()

    def before_weight_sync(self) -> None:
        """Called on every rank whose weights are about to be taken.

        Computed `weight_tensors`, such as merged ones, are brought up to date here, in place.
        """

    def after_weight_sync(self, version: int) -> None:
        """New weights have been written into `weight_tensors`."""
        self.policy_version = version

    def load_checkpoint(self, folder: str) -> None:
        """Load what `save_checkpoint` saved.

        Raises:
            CheckpointError: the file is missing, damaged, or does not fit the model.
        """
        path = Path(folder) / state_file_name(self.layout, self.rank)
        load_state(path, self.model, self.optimizer, self.device, self.scheduler)

    def wants_whole_episode(self, columns: Sequence[str]) -> bool:
        """Whether `prepare_episode` is of use for an episode whose rows have these columns.

        Asked of trainers whose `needs_whole_episode` is True, with `self.num_updates` at hand.
        Where it is not, training can begin while the episode's samples still arrive.
        """
        del columns
        return self.needs_whole_episode

    def prepare_episode(self, batches: list[list[dict[str, Any]]]) -> None:
        """See every global batch of an episode before its first update.

        Called on trainers whose `needs_whole_episode` is True. `self.row_ids` is nested alike.

        Args:
            batches: this rank's micro-batches of each global batch.
        """

    def _attached(self, value: AttachedT | None) -> AttachedT:
        if value is None:
            raise ChatLearnError(
                f"model {self.name!r} is only a description here, in the program that builds the "
                "flows: layout, device, config and folders are there inside its workers (in "
                "setup, forward_step, ...)"
            )
        return value

    def _missing(self, method_name: str) -> FlowError:
        return FlowError(
            f"model {self.name!r} has no {method_name}: define it in {type(self).__name__}"
        )


trace_methods(BaseModule, missing=STEPS)
