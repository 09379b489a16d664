"""How a model wants its streams, by its layout and its settings."""

from typing import Any

import torch

from megatron_adapters.model_config import MegatronSettings
from megatron_adapters.packing import PackingOptions
from megatron_adapters.parallel_state import ParallelGroups
from megatron_adapters.precision import has_native_bf16

__all__ = ["build_packing_options", "shares_prompts"]


def build_packing_options(
    settings: MegatronSettings,
    groups: ParallelGroups,
    *,
    shares_prompts: bool,
    reads_last: bool,
    device: torch.device,
) -> PackingOptions:
    """The options of one model on this rank.

    Args:
        settings: Megatron's configuration objects.
        groups: of this rank.
        shares_prompts: see the function of this name.
        reads_last: the head is read at each row's last token.
        device: where the model lives.
    """
    transformer, layout = settings.transformer, groups.layout
    window = transformer.window_size
    return PackingOptions(
        max_length=settings.shape.max_sequence_length,
        multiple=layout.tp_size if transformer.sequence_parallel else 1,
        is_uniform=layout.pp_size > 1,
        has_few_lengths=_has_few_lengths(transformer, device),
        shares_prompts=shares_prompts,
        reads_last=reads_last,
        context_size=layout.cp_size,
        context_rank=groups.coordinates.cp_rank,
        window=window[0] if window else None,
        dtype=transformer.params_dtype,
        device=device,
    )


def shares_prompts(transformer: Any, *, is_trained: bool) -> bool:
    """Whether a token's result depends on its own past only, so that samples may share it.

    Dropout would be the same for all that share a prompt. A capacity of experts counts tokens
    always; losses over experts do so only where something is learned. A selection bias balances
    the tokens that experts compute, and a shared prompt is computed once.

    Args:
        transformer: Megatron's configuration of the network.
        is_trained: dropout is on, and losses over experts are there.
    """
    if transformer.num_moe_experts and transformer.moe_expert_capacity_factor is not None:
        return False
    if not is_trained:
        return True
    has_dropout = max(transformer.hidden_dropout, transformer.attention_dropout) > 0
    has_expert_loss = bool(transformer.num_moe_experts) and (
        transformer.moe_router_load_balancing_type != "none"
        or transformer.moe_z_loss_coeff is not None
    )
    return not has_dropout and not has_expert_loss


def _has_few_lengths(transformer: Any, device: torch.device) -> bool:
    """Whether oneDNN's products, which are compiled for each shape, take part.

    Not with experts: tokens that fill up would take room in them.
    """
    is_compiled = transformer.params_dtype == torch.bfloat16 and has_native_bf16("cpu")
    return device.type == "cpu" and is_compiled and not transformer.num_moe_experts
