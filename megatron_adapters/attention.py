"""The attention core on torch's fused kernel, for training, scoring and generation."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_adapters.kv_cache import CacheView

__all__ = ["FusedAttention"]


class FusedAttention(nn.Module):
    """Grouped-query attention through `scaled_dot_product_attention`.

    Stands where Megatron's DotProductAttention would. It looks up the key-value cache where the
    mask is a CacheView; otherwise it is causal, as decoder models are.

    Args:
        config: Megatron's TransformerConfig.
        layer_number: counted from 1 over the whole model.
        attn_mask_type: Megatron's mask type; causal.
        attention_type: `self`.
        softmax_scale: factor of the scores; None: 1 / sqrt(head size).
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **_others: Any,
    ) -> None:
        super().__init__()
        del attn_mask_type, cp_comm_type, pg_collection
        if config.context_parallel_size > 1:
            raise ValueError("this attention core has no context parallelism: set it to 1")
        if config.window_size is not None or config.softmax_type != "vanilla":
            raise ValueError(
                "this attention core has neither a sliding window nor another softmax: leave "
                f"window_size and softmax_type out, got {config.window_size} and "
                f"{config.softmax_type!r}"
            )
        if attention_type != "self":
            raise ValueError(f"this attention core serves self attention, got {attention_type!r}")
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout = float(dropout)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | CacheView | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [tokens, batch, heads, size].
            key: [tokens, batch, groups, size].
            value: [tokens, batch, groups, size].
            attention_mask: a CacheView; anything else is ignored, the mask is causal.
            attn_mask_type: unused.
            attention_bias: must be None.
            packed_seq_params: must be None.

        Returns:
            [tokens, batch, heads * size].
        """
        del attn_mask_type
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("this attention core takes neither a bias nor packed sequences")
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        if isinstance(attention_mask, CacheView):
            context = self._attend_cached(query, key, value, attention_mask)
        else:
            context = functional.scaled_dot_product_attention(
                query,
                key,
                value,
                dropout_p=self.dropout if self.training else 0.0,
                is_causal=True,
                scale=self.softmax_scale,
                enable_gqa=key.shape[1] != query.shape[1],
            )
        batch, heads, tokens, size = context.shape
        return context.permute(2, 0, 1, 3).reshape(tokens, batch, heads * size)

    def _attend_cached(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: CacheView
    ) -> torch.Tensor:
        keys, values = view.extend(self.layer_number, key, value)
        batch, heads, tokens, size = query.shape
        groups = keys.shape[1]
        if tokens == 1:
            # The query heads of a group become rows of one product with its keys.
            query = query.reshape(batch, groups, heads // groups, size)
        # The same kernel as without a cache, so that bf16 rounds the same way in both.
        context = functional.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=view.mask,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != groups,
        )
        return context.reshape(batch, heads, tokens, size)
