"""MegatronModule: a module whose model is a Megatron-Core network, sharded as the config says."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from chatlearn.data.tokenizer import SentencePieceTokenizer, Tokenizer
from chatlearn.errors import ConfigError, DataError
from chatlearn.models.base import BaseModule
from chatlearn.models.plain_weights import HUGGINGFACE
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters import checkpointing
from megatron_adapters.batches import Rows, check_token_ids
from megatron_adapters.layer_specs import (
    has_transformer_engine,
    is_transformer_engine_installed,
)
from megatron_adapters.layout_problems import find_layout_problems
from megatron_adapters.model_building import build_model
from megatron_adapters.model_config import MegatronSettings, build_settings
from megatron_adapters.packing import (
    PackedBatch,
    PackingOptions,
    pack_micro_batches,
    split_by_tokens,
)
from megatron_adapters.parallel_state import (
    ParallelGroups,
    initialize_parallel_state,
    read_groups,
)
from megatron_adapters.training import TrainingState, build_training_state
from megatron_adapters.weights import describe_layout
from megatron_adapters.weights.architecture import Head
from megatron_adapters.weights.huggingface import huggingface_renaming
from megatron_adapters.weights.live_description import (
    describe_weights,
    frozen_names,
    weight_tensors,
)

if TYPE_CHECKING:
    from chatlearn.config import ModelConfig
    from chatlearn.parallel.layout import ParallelLayout

__all__ = ["MegatronModule"]

# Tokens of one forward pass without gradients.
_SCORING_TOKENS = 8192


class MegatronModule(BaseModule):
    """One Megatron-Core model. Subclasses set `head`, `is_trained` and `use_cache`.

    Attributes:
        head: `lm` gives logits, `scalar` one number per token.
        is_trained: builds optimizer and schedule.
        use_cache: the model generates.
        reads_last: a scalar head is read at a row's last token, not before each response token.
        settings: Megatron's configuration objects, after `initialize`.
        groups: this rank's process groups, after `initialize`.
        model: the model chunks of this rank, after `setup`.
        training: optimizer and schedule of a trained model, after `setup`.
    """

    head: ClassVar[Head] = "lm"
    is_trained: ClassVar[bool] = False
    use_cache: ClassVar[bool] = False
    reads_last: ClassVar[bool] = False
    weight_naming: str = "megatron"

    settings: MegatronSettings
    groups: ParallelGroups
    training: TrainingState | None = None
    _tokenizer: Tokenizer | None = None

    def initialize(self) -> None:
        """Set up Megatron's parallel state and configuration objects."""
        seed = self.runtime_args.seed
        initialize_parallel_state(self.layout, self.device, seed)
        self.settings = build_settings(
            self.name,
            self.module_args.megatron,
            self.layout,
            self.device,
            is_generating=self.use_cache,
        )
        self.groups = read_groups(self.layout)

    def setup(self) -> None:
        """Build the model with its initial values, which depend on the seed only."""
        self.model = build_model(
            self.settings,
            self.layout,
            self.device,
            head=self.head,
            seed=self.runtime_args.seed,
            is_trained=self.is_trained,
        )
        if self.is_trained:
            self.training = build_training_state(self.name, self.model, self.settings, self.groups)
            self.optimizer = self.training.optimizer

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of `runtime.tokenizer`.

        Raises:
            ConfigError: none is named, or it has more tokens than the model.
        """
        if self._tokenizer is None:
            path = self.runtime_args.tokenizer
            if path is None:
                raise ConfigError(
                    f"model {self.name!r} gets text but runtime.tokenizer is not set: name a "
                    "sentencepiece .model file, or give rows with prompt_token_ids"
                )
            tokenizer = SentencePieceTokenizer(path)
            if tokenizer.vocab_size > self.settings.shape.vocab_size:
                raise ConfigError(
                    f"{path} has {tokenizer.vocab_size} tokens, models.{self.name}.vocab_size is "
                    f"{self.settings.shape.vocab_size}: raise vocab_size"
                )
            self._tokenizer = tokenizer
        return self._tokenizer

    def pack(self, micro_batches: Sequence[Rows], *, temperature: float = 1.0) -> list[PackedBatch]:
        """Pack micro-batches to streams for this rank's pipeline."""
        vocab_size = self.settings.shape.vocab_size
        for rows in micro_batches:
            check_token_ids((*rows.prompts, *rows.responses), vocab_size)
        return pack_micro_batches(micro_batches, self.packing, temperature=temperature)

    def pack_for_scoring(self, rows: Rows, *, temperature: float = 1.0) -> list[PackedBatch]:
        """Cut rows to micro-batches by tokens, and pack them; a pipeline gets enough to be full."""
        stages = self.layout.pp_size
        least = 2 * stages if stages > 1 else 1
        parts = split_by_tokens(rows, _SCORING_TOKENS, least)
        return self.pack(parts, temperature=temperature)

    @property
    def packing(self) -> PackingOptions:
        """How this model wants its streams."""
        transformer, layout = self.settings.transformer, self.layout
        window = transformer.window_size
        return PackingOptions(
            max_length=self.settings.shape.max_sequence_length,
            multiple=layout.tp_size if transformer.sequence_parallel else 1,
            is_uniform=layout.pp_size > 1,
            shares_prompts=self._shares_prompts(),
            reads_last=self.reads_last,
            context_size=layout.cp_size,
            context_rank=self.groups.coordinates.cp_rank,
            window=window[0] if window else None,
            dtype=transformer.params_dtype,
            device=self.device,
        )

    def _shares_prompts(self) -> bool:
        """Whether a token's result depends on its past only, not on what else is in the batch.

        Dropout would be the same for all that share a prompt; a load-balancing loss or a capacity
        of experts counts tokens.
        """
        transformer = self.settings.transformer
        has_dropout = max(transformer.hidden_dropout, transformer.attention_dropout) > 0
        counts = bool(transformer.num_moe_experts) and (
            transformer.moe_router_load_balancing_type != "none"
            or transformer.moe_expert_capacity_factor is not None
        )
        return not (self.is_trained and has_dropout) and not counts

    def weight_shards(self) -> tuple[TensorShard, ...]:
        """This rank's shards, by Megatron's own description."""
        return describe_weights(self.model, self.settings.shape.vocab_size)

    def weight_shards_in(self, naming: str) -> tuple[TensorShard, ...]:
        """This rank's shards in Megatron's naming or in that of `transformers`."""
        if naming != HUGGINGFACE:
            return super().weight_shards_in(naming)
        renaming = huggingface_renaming(
            self.module_args.megatron, head=self.head, use_te=has_transformer_engine(self.device)
        )
        return renaming.apply(self.weight_shards())

    def find_problems(self, config: "ModelConfig", layout: "ParallelLayout") -> Sequence[str]:
        """What Megatron or our generation would refuse once the workers run."""
        return find_layout_problems(
            config.megatron, layout, is_generating=self.use_cache, is_trained=self.is_trained
        )

    def planned_weight_shards(
        self, config: "ModelConfig", layout: "ParallelLayout"
    ) -> tuple[tuple[TensorShard, ...], ...] | None:
        """By rank, from the config alone; None for a subclass that overrides `weight_shards`.

        Transformer Engine names some weights differently. It is expected on the devices of the
        workers if this machine has it.

        Raises:
            ConfigError: the layout cannot hold such a model, or a field is set whose effect on
                the weights only the live module knows.
        """
        if type(self).weight_shards is not MegatronModule.weight_shards:
            return None
        is_on_cpu = config.num_gpu == 0 or config.num_cpu > 0
        return describe_layout(
            config.megatron,
            layout,
            head=self.head,
            is_generating=self.use_cache,
            use_te=is_transformer_engine_installed() and not is_on_cpu,
        )

    def weight_tensors(self) -> Mapping[str, torch.Tensor]:
        """This rank's weights."""
        return weight_tensors(self.model)

    def frozen_weights(self) -> Collection[str]:
        """Parameters of a trained model that get no gradient."""
        return frozen_names(self.model) if self.is_trained else ()

    def save_checkpoint(self, iteration: int) -> None:
        """Write the model in Megatron's distributed format; every rank takes part."""
        checkpointing.save_model(self.checkpoint_dir, self.model, self.training, iteration)

    def load_checkpoint(self, folder: str) -> None:
        """Start from saved weights; a scalar head that the checkpoint lacks stays as it is."""
        if not Path(folder).is_dir():
            raise ConfigError(f"models.{self.name}.load: {folder} is no folder")
        skip = ("output_layer.weight",) if self._lacks_head(folder) else ()
        checkpointing.load_weights(folder, self.model, skip=skip)
        if self.training is not None:
            # The optimizer keeps a copy of the weights in full precision.
            self.training.optimizer.reload_model_params()

    def _lacks_head(self, folder: str) -> bool:
        """Whether a scalar model starts from a language model's checkpoint."""
        if self.head == "lm":
            return False
        shape = checkpointing.saved_shape(folder, "output_layer.weight")
        return shape is None or shape[0] != 1

    def require_columns(self, data: Mapping[str, Any], *keys: str) -> None:
        """Refuse a batch that lacks columns.

        Raises:
            DataError: names the missing ones and those there are.
        """
        missing = [key for key in keys if key not in data]
        if missing:
            raise DataError(
                f"model {self.name!r} needs the columns {', '.join(keys)}; missing: "
                f"{', '.join(missing)}; the batch has {', '.join(data) or 'none'}"
            )
