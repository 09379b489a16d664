"""Which models cannot be built on which layout, known from the config alone. Pure."""

from collections.abc import Mapping
from typing import Any, cast

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.weights.pipeline_split import split_layers

__all__ = ["find_layout_problems", "find_lora_problems"]


def find_layout_problems(
    fields: Mapping[str, Any], layout: ParallelLayout, *, is_generating: bool, is_trained: bool
) -> tuple[str, ...]:
    """A line for each reason; none where a required field is missing, which is said elsewhere.

    Args:
        fields: the flat Megatron fields of one model.
        layout: of one replica.
        is_generating: the model decodes token by token.
        is_trained: the model computes gradients.
    """
    problems: list[str] = []
    if is_generating and layout.vpp_size > 1:
        problems.append(
            "a model that generates has no virtual stages: leave "
            "virtual_pipeline_model_parallel_size out"
        )
    if is_generating and layout.cp_size > 1:
        problems.append(
            "a model that generates has no context parallelism: leave context_parallel_size out"
        )
    window = fields.get("window_size")
    if window is not None and not _is_window(window):
        problems.append(f"window_size is [tokens back, 0], at least [0, 0], got {window}")
    has_experts = bool(fields.get("num_moe_experts"))
    if is_trained and has_experts and layout.tp_size > 1 and not fields.get("sequence_parallel"):
        problems.append(
            f"training experts with tensor_model_parallel_size={layout.tp_size} needs "
            "sequence_parallel: true"
        )
    etp_size = layout.tp_size if layout.etp_size is None else layout.etp_size
    if is_trained and has_experts and layout.ep_size == 1 and etp_size != layout.tp_size:
        # Megatron-Core 0.16.1 takes them for dense weights, and leaves their gradients apart.
        problems.append(
            f"experts of expert_tensor_parallel_size={etp_size} beside tensor_model_parallel_size="
            f"{layout.tp_size} are trained right only with expert_model_parallel_size > 1"
        )
    if fields.get("num_layers") is not None:
        try:
            split_layers(fields, layout)
        except ConfigError as error:
            problems.append(str(error))
    return tuple(problems)


def find_lora_problems(
    fields: Mapping[str, Any], layout: ParallelLayout, *, is_trained: bool
) -> tuple[str, ...]:
    """A line for each reason why a model cannot have adapters.

    Args:
        fields: the flat Megatron fields of one model.
        layout: of one replica.
        is_trained: the model computes gradients.
    """
    problems: list[str] = []
    if not is_trained:
        problems.append(
            "lora is for a trained model; the inference model gets merged weights: leave it out"
        )
    if fields.get("multi_latent_attention"):
        problems.append("lora with multi_latent_attention is not supported yet: leave it out")
    groups = fields.get("num_query_groups") or fields.get("num_attention_heads") or 0
    if groups and groups % layout.tp_size:
        problems.append(
            f"lora needs num_query_groups={groups} to be a multiple of "
            f"tensor_model_parallel_size={layout.tp_size}"
        )
    etp_size = layout.tp_size if layout.etp_size is None else layout.etp_size
    if fields.get("num_moe_experts") and etp_size > 1:
        problems.append(f"lora on experts needs expert_tensor_parallel_size: 1, got {etp_size}")
    if fields.get("moe_grouped_gemm"):
        problems.append("lora needs moe_grouped_gemm: false")
    if fields.get("attention_output_gate"):
        problems.append("lora with attention_output_gate is not supported: leave it out")
    return tuple(problems)


def _is_window(window: Any) -> bool:
    if not isinstance(window, (list, tuple)):
        return False
    sizes = cast("list[Any]", window)
    is_whole = all(isinstance(size, int) for size in sizes)
    return len(sizes) == 2 and is_whole and sizes[0] >= 0 and sizes[1] == 0
