"""Tokens that only fill a stream do not count for the balance of experts.

Seen in megatron-core 0.16.1: with a padding mask the router's count for its selection bias combines
[tokens, experts] with [tokens], which fails; the auxiliary loss of a stream without a single token
of a row divides by zero, which makes every gradient NaN; and the z-loss of a stream that is cut to
ranks weighs each rank's part alike, however many tokens of rows are in it.
"""

from typing import Any

import torch

from megatron_adapters.patches.guard import expect_source

__all__ = ["apply"]


def apply() -> None:
    """Replace the count and the z-loss, and let an empty stream have one token."""
    from megatron.core.transformer.moe import router

    kind: Any = router.TopKRouter
    expect_source(kind._apply_expert_bias, "routing_map & (~padding_mask)\n", "moe_padding")
    kind._apply_expert_bias = _count_tokens
    expect_source(kind.apply_z_loss, "moe_z_loss_coeff / self.tp_cp_group.size()", "moe_padding")
    own_z_loss = kind.apply_z_loss

    def apply_z_loss(self: Any, logits: torch.Tensor, padding_mask: Any = None) -> torch.Tensor:
        if padding_mask is None:
            return own_z_loss(self, logits)
        return _attach_z_loss(self, logits, padding_mask)

    kind.apply_z_loss = apply_z_loss
    count: Any = router.get_tokens_per_expert_and_token_count
    expect_source(count, "total_num_tokens = global_tokens_per_expert.sum() / topk", "moe_padding")

    def count_at_least_one(*args: Any, **options: Any) -> Any:
        per_expert, own, total = count(*args, **options)
        return per_expert, own, total.clamp(min=1) if isinstance(total, torch.Tensor) else total

    router.get_tokens_per_expert_and_token_count = count_at_least_one


def _attach_z_loss(router: Any, logits: torch.Tensor, padding_mask: torch.Tensor) -> torch.Tensor:
    """The logits [tokens, experts], with the mean of logsumexp^2 as a loss behind them (ST-MoE)."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    weight = router.config.moe_z_loss_coeff
    if weight is None or not router.training or not torch.is_grad_enabled():
        return logits
    total = (~padding_mask).sum()
    distributed: Any = torch.distributed
    distributed.all_reduce(total, group=router.tp_cp_group)
    values = torch.logsumexp(logits, dim=-1).square() * ~padding_mask
    loss = values.sum() * weight / total.clamp(min=1)
    scaler: Any = MoEAuxLossAutoScaler
    return scaler.apply(logits, loss)


def _count_tokens(
    router: Any, routing_map: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> None:
    """Add the tokens [experts] of a routing map [tokens, experts] to the router's count."""
    if not router.enable_expert_bias or not torch.is_grad_enabled():
        return
    with torch.no_grad():
        if padding_mask is not None:
            routing_map = routing_map & ~padding_mask[:, None]
        router.local_tokens_per_expert += routing_map.sum(dim=0)
