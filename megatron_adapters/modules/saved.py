"""SavedModule: what a Megatron model writes to checkpoints and reads from them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.errors import ConfigError
from megatron_adapters import checkpointing
from megatron_adapters.checkpoint_writer import StagingArea
from megatron_adapters.model_config import MegatronSettings
from megatron_adapters.modules.planned import PlannedModule
from megatron_adapters.parallel_state import read_tracker, restore_tracker
from megatron_adapters.precision import with_precision
from megatron_adapters.training import TrainingState
from megatron_adapters.weights.export import export_shards, plan_export
from megatron_adapters.weights.model_file import record_of, write_model_file

if TYPE_CHECKING:
    from megatron_adapters.lora.adapted_model import AdaptedModel

__all__ = ["SavedModule"]


class SavedModule(PlannedModule):
    """A Megatron model with a place on disk. `MegatronModule` builds it.

    Attributes:
        settings: Megatron's configuration objects, after `initialize`.
        training: optimizer and schedule of a trained model, after `setup`.
        adapted: its low-rank adapters, after `setup`; None: it has none.
    """

    settings: MegatronSettings
    training: TrainingState | None = None
    adapted: "AdaptedModel | None" = None
    _staging: StagingArea | None = None
    _has_saved: bool = False

    def save_checkpoint(self, iteration: int) -> None:
        """Write the model in Megatron's distributed format; every rank takes part."""
        if self.writes_beside and self._staging is None:
            self._staging = StagingArea()
        save = checkpointing.save_model(
            self.checkpoint_dir,
            self.model,
            self.training,
            iteration,
            staging=self._staging if self.writes_beside else None,
            is_checked=not self._has_saved,
            timeout_s=self.runtime_args.stage_timeout_s,
        )
        # Who saves which part does not change from save to save.
        self._has_saved = True
        self.write_files(save.write)
        if self.context.rank == 0:
            fields = with_precision(self.module_args.megatron, self.device.type)
            write_model_file(self.checkpoint_dir, record_of(self.head, self.module_args, fields))
        if self.adapted is not None:
            self.adapted.save(self.checkpoint_dir / "adapter")
        if self.module_args.save_huggingface:
            self.save_huggingface(self.checkpoint_dir / "huggingface")

    def save_huggingface(self, folder: Path) -> None:
        """Write the model as a Hugging Face folder; every rank of the replica calls this.

        Raises:
            ConfigError: the model belongs to no known family.
            CheckpointError: the folder cannot be written.
        """
        tokenizer = self.runtime_args.tokenizer
        self.before_weight_sync()
        export_shards(
            folder,
            plan_export(
                with_precision(self.module_args.megatron, self.device.type),
                head=self.head,
                family=self.module_args.family,
                template=self.module_args.pretrained,
                use_te=self.settings.use_te,
            ),
            self.weight_shards(),
            self.weight_tensors(),
            tokenizer=None if tokenizer is None else Path(tokenizer),
        )

    def resume_checkpoint(self, folder: str) -> None:
        """Go on from a checkpoint with optimizer and schedule, whatever layout wrote it."""
        if self.training is None:
            self.load_checkpoint(folder)
        else:
            checkpointing.load_training(folder, self.training)

    def read_generators(self) -> dict[str, Any]:
        """Also those of Megatron's random number tracker."""
        return {**super().read_generators(), "megatron": read_tracker()}

    def restore_generators(self, states: Mapping[str, Any]) -> None:
        """Also those of Megatron's random number tracker."""
        if "megatron" in states:
            restore_tracker(states["megatron"])
        super().restore_generators(states)

    def load_checkpoint(self, folder: str) -> None:
        """Start from saved weights; a scalar head that the checkpoint lacks stays as it is."""
        if not os.path.isdir(folder):
            raise ConfigError(f"models.{self.name}.load: {folder} is no folder")
        skip: tuple[str, ...] = ()
        if self.head == "scalar" and checkpointing.lacks_scalar_head(folder):
            skip = ("output_layer.weight",)
        if self.adapted is not None and not checkpointing.has_adapters(folder):
            skip += (".lora_A", ".lora_B")
        checkpointing.load_weights(folder, self.model, skip=skip)
        if self.training is not None:
            # The optimizer keeps a copy of the weights in full precision.
            self.training.optimizer.reload_model_params()
