"""MegatronModule: a module whose model is a Megatron-Core network, sharded as the config says."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from chatlearn.data.tokenizer import Tokenizer, load_tokenizer
from chatlearn.errors import ConfigError, DataError
from chatlearn.models.plain_weights import HUGGINGFACE
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.batches import Rows, check_token_ids
from megatron_adapters.model_building import build_model
from megatron_adapters.model_config import build_settings
from megatron_adapters.modules.saved import SavedModule
from megatron_adapters.packing import PackedBatch, pack_micro_batches
from megatron_adapters.packing_options import build_packing_options, shares_prompts
from megatron_adapters.parallel_state import (
    ParallelGroups,
    initialize_parallel_state,
    read_groups,
)
from megatron_adapters.precision import with_precision
from megatron_adapters.training import build_training_state
from megatron_adapters.weights.huggingface import huggingface_renaming
from megatron_adapters.weights.live_description import (
    describe_weights,
    frozen_names,
    weight_tensors,
)
from megatron_adapters.weights.pretrained import load_shards

if TYPE_CHECKING:
    from chatlearn.config.schema import LoraConfig

__all__ = ["MegatronModule"]


class MegatronModule(SavedModule):
    """One Megatron-Core model. Subclasses set `head`, `is_trained` and `use_cache`.

    Attributes:
        reads_last: a scalar head is read at a row's last token, not before each response token.
        settings: Megatron's configuration objects, after `initialize`.
        groups: this rank's process groups, after `initialize`.
        model: the model chunks of this rank, after `setup`.
        training: optimizer and schedule of a trained model, after `setup`.
        adapted: its low-rank adapters, after `setup`; None: it has none.
    """

    reads_last: ClassVar[bool] = False
    weight_naming: str = "megatron"

    groups: ParallelGroups
    _tokenizer: Tokenizer | None = None

    def initialize(self) -> None:
        """Set up Megatron's parallel state and configuration objects."""
        seed = self.runtime_args.seed
        initialize_parallel_state(self.layout, self.device, seed)
        self.settings = build_settings(
            self.name,
            with_precision(self.module_args.megatron, self.device.type),
            self.layout,
            self.device,
            is_generating=self.use_cache,
        )
        if self.module_args.lora is not None:
            # The adapted layers are our own.
            self.settings = replace(self.settings, use_te=False)
        self.groups = read_groups(self.layout)
        self.shares_prompts = shares_prompts(self.settings.transformer, is_trained=self.is_trained)

    def setup(self) -> None:
        """Build the model with its initial values, which depend on the seed only."""
        self.model = build_model(
            self.settings,
            self.layout,
            self.device,
            head=self.head,
            seed=self.runtime_args.seed,
            is_trained=self.is_trained,
            lora=self.module_args.lora,
        )
        folder = self.module_args.pretrained
        if folder is not None:
            load_shards(
                folder,
                describe_weights(self.model, self.settings.shape.vocab_size),
                weight_tensors(self.model),
                self.module_args.megatron,
                head=self.head,
                use_te=self.settings.use_te,
            )
        if self.module_args.lora is not None:
            self._set_up_adapters(self.module_args.lora)
        if self.is_trained:
            self.training = build_training_state(self.name, self.model, self.settings, self.groups)
            self.optimizer = self.training.optimizer

    def _set_up_adapters(self, lora: "LoraConfig") -> None:
        from megatron_adapters.lora.adapted_model import AdaptedModel

        self.adapted = AdaptedModel(self.model, lora, self.module_args.pretrained)
        if lora.adapter is not None:
            self.adapted.load(lora.adapter)

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
                    "sentencepiece .model file or a Hugging Face folder, or give rows with "
                    "prompt_token_ids"
                )
            tokenizer = load_tokenizer(path, self.runtime_args.chat_template)
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
        options = build_packing_options(
            self.settings,
            self.groups,
            shares_prompts=self.shares_prompts,
            reads_last=self.reads_last,
            device=self.device,
        )
        return pack_micro_batches(micro_batches, options, temperature=temperature)

    def has_own_description(self) -> bool:
        """Whether a subclass overrides `weight_shards`."""
        return type(self).weight_shards is not MegatronModule.weight_shards

    def weight_shards(self) -> tuple[TensorShard, ...]:
        """This rank's shards, by Megatron's own description."""
        return describe_weights(self.model, self.settings.shape.vocab_size)

    def weight_shards_in(self, naming: str) -> tuple[TensorShard, ...]:
        """This rank's shards in Megatron's naming or in that of `transformers`."""
        if naming != HUGGINGFACE:
            return super().weight_shards_in(naming)
        renaming = huggingface_renaming(
            self.module_args.megatron, head=self.head, use_te=self.settings.use_te
        )
        return renaming.apply(self.weight_shards())

    def weight_tensors(self) -> Mapping[str, torch.Tensor]:
        """This rank's weights; with adapters, merged ones as of the last sync."""
        tensors = weight_tensors(self.model)
        return tensors if self.adapted is None else self.adapted.with_merged(tensors)

    def before_weight_sync(self) -> None:
        """Merge the adapters."""
        if self.adapted is not None:
            self.adapted.merge()

    def frozen_weights(self) -> Collection[str]:
        """Weights of a trained model that training does not change."""
        if not self.is_trained:
            return ()
        changed = frozenset[str]() if self.adapted is None else self.adapted.target_names
        return tuple(name for name in frozen_names(self.model) if name not in changed)

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
