"""What a Megatron module says of itself on the driver, before any worker is up."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from chatlearn.data.tokenizer import find_tokenizer
from chatlearn.errors import ConfigError
from chatlearn.models.base import BaseModule, CompletedConfig
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.layer_specs import is_transformer_engine_installed, needs_own_layers
from megatron_adapters.layout_problems import find_layout_problems, find_lora_problems
from megatron_adapters.precision import with_precision
from megatron_adapters.weights import describe_layout
from megatron_adapters.weights.architecture import Head
from megatron_adapters.weights.export import plan_export
from megatron_adapters.weights.pretrained_fields import complete_fields

if TYPE_CHECKING:
    from chatlearn.config import ModelConfig
    from chatlearn.parallel.layout import ParallelLayout

__all__ = ["PlannedModule"]


class PlannedModule(BaseModule):
    """A module whose fields, layout and weights are known from its config.

    Attributes:
        head: `lm` gives logits, `scalar` one number per token.
        is_trained: builds optimizer and schedule.
        use_cache: the model generates.
    """

    head: ClassVar[Head] = "lm"
    is_trained: ClassVar[bool] = False
    use_cache: ClassVar[bool] = False

    def complete_config(self, config: "ModelConfig") -> CompletedConfig:
        """The fields and the tokenizer of the folder that `pretrained` names."""
        if config.lora is not None and config.lora.adapter is not None:
            from megatron_adapters.lora.peft_files import complete_lora

            config = config.model_copy(update={"lora": complete_lora(config.lora)})
        if config.pretrained is None:
            return CompletedConfig(config)
        found = complete_fields(config.pretrained, config.megatron, self.head)
        completed = config.model_copy(update={"megatron": dict(found.fields)})
        return CompletedConfig(completed, found.notes, find_tokenizer(config.pretrained))

    def find_problems(self, config: "ModelConfig", layout: "ParallelLayout") -> Sequence[str]:
        """What Megatron or our generation would refuse once the workers run."""
        problems = find_layout_problems(
            config.megatron, layout, is_generating=self.use_cache, is_trained=self.is_trained
        )
        if config.save_huggingface:
            problems += self._find_export_problems(config)
        if config.lora is not None:
            problems += find_lora_problems(config.megatron, layout, is_trained=self.is_trained)
        return problems

    def _find_export_problems(self, config: "ModelConfig") -> tuple[str, ...]:
        try:
            plan_export(
                config.megatron,
                head=self.head,
                family=config.family,
                template=config.pretrained,
            )
        except ConfigError as error:
            return (f"save_huggingface: {error}",)
        return ()

    def decide_precision(self, config: "ModelConfig", device_type: str) -> "ModelConfig":
        """The model's config as its workers will take it on such devices, `cpu` or `cuda`."""
        fields = with_precision(config.megatron, device_type)
        return config.model_copy(update={"megatron": fields})

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
        if self.has_own_description():
            return None
        is_on_cpu = config.num_gpu == 0 or config.num_cpu > 0
        return describe_layout(
            with_precision(config.megatron, "cpu" if is_on_cpu else "cuda"),
            layout,
            head=self.head,
            is_generating=self.use_cache,
            use_te=is_transformer_engine_installed()
            and not is_on_cpu
            and not needs_own_layers(config.megatron)
            and config.lora is None,
        )

    def has_own_description(self) -> bool:
        """Whether a subclass describes its weights in a way of its own."""
        return False
