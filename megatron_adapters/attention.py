# pyright: standard, reportPrivateImportUsage=false
"""The attention core on torch's fused kernel, for training, scoring and generation."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_adapters.attention_plan import AttentionPlan
from megatron_adapters.fused import rotate
from megatron_adapters.kv_cache import CacheView
from megatron_adapters.masked_attention import attend_fused
from megatron_adapters.short_attention import attend_short, is_short

__all__ = ["FusedAttention", "attend", "has_window"]


class FusedAttention(nn.Module):
    """Grouped-query attention through `scaled_dot_product_attention`.

    Stands where Megatron's DotProductAttention would. It looks up the key-value cache where the
    mask is a CacheView; otherwise it attends within a packed stream, as its AttentionPlan says, and
    applies the rotary positions that the plan holds.

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
        del attn_mask_type, cp_comm_type
        if config.softmax_type != "vanilla":
            raise ValueError(
                "this attention core has no other softmax: leave softmax_type out, got "
                f"{config.softmax_type!r}"
            )
        if attention_type != "self":
            raise ValueError(f"this attention core serves self attention, got {attention_type!r}")
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.dropout = float(dropout)
        self.is_interleaved = bool(config.rotary_interleaved)
        no_rope = config.no_rope_freq
        self.has_rotary = not (no_rope and no_rope[layer_number - 1])
        self.is_windowed = has_window(config, layer_number)
        self.context_group = pg_collection.cp if pg_collection is not None else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: CacheView | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: AttentionPlan | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [tokens, batch, heads, size].
            key: [tokens, batch, groups, size].
            value: [tokens, batch, groups, value size].
            attention_mask: a CacheView, in generation.
            attn_mask_type: unused.
            attention_bias: must be None.
            packed_seq_params: the plan of a packed stream, without a CacheView; batch is 1.

        Returns:
            [tokens, batch, heads * value size].
        """
        del attn_mask_type
        if attention_bias is not None:
            raise ValueError("this attention core takes no bias")
        if isinstance(attention_mask, CacheView):
            query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
            context = self._attend_cached(query, key, value, attention_mask)
            batch, heads, tokens, size = context.shape
            return context.permute(2, 0, 1, 3).reshape(tokens, batch, heads * size)
        if not isinstance(packed_seq_params, AttentionPlan):
            raise TypeError(
                "this attention core needs an AttentionPlan as packed_seq_params, or a CacheView "
                f"as attention_mask; got {type(packed_seq_params).__name__}"
            )
        return self._attend_packed(query, key, value, packed_seq_params)

    def _attend_packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        cos, sin = plan.cos, plan.sin
        if self.is_windowed and plan.local_cos is not None:
            cos, sin = plan.local_cos, plan.local_sin
        if cos is not None and sin is not None and self.has_rotary:
            query = rotate(query, cos, sin, is_interleaved=self.is_interleaved)
            key = rotate(key, cos, sin, is_interleaved=self.is_interleaved)
        group = self.context_group
        if group is not None and group.size() > 1:
            key, value = _gather_keys(key, value, group)
        return attend(
            query,
            key,
            value,
            plan,
            is_windowed=self.is_windowed,
            dropout=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
        )

    def _attend_cached(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, view: CacheView
    ) -> torch.Tensor:
        """Packed tokens as one row: [1, heads, packed, size] each, see `CacheView.attend`."""
        query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        cos, sin = view.local_turns if self.is_windowed else view.turns
        if cos is not None and sin is not None and self.has_rotary:
            query, key = (
                rotate(t[:, None], cos, sin, is_interleaved=self.is_interleaved)[:, 0]
                for t in (query, key)
            )
        packed, groups, size = key.shape
        value_size = value.shape[-1]
        context = view.attend(
            self.layer_number,
            query.reshape(packed, groups, -1, size),
            key,
            value,
            self.softmax_scale,
            is_windowed=self.is_windowed,
        )
        return context.view(packed, -1, value_size).transpose(0, 1)[None]


def has_window(config: Any, layer_number: int) -> bool:
    """Whether a layer has a sliding window, by `window_size` and `window_attn_skip_freq`."""
    from megatron.core.transformer.utils import is_layer_window_attention

    return bool(
        is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    *,
    is_windowed: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention within a packed stream.

    Args:
        query: [tokens, 1, heads, size], this rank's.
        key: [stream, 1, groups, size], of all context-parallel ranks, rank after rank.
        value: [stream, 1, groups, value size].
        plan: who attends to whom.
        is_windowed: use the sliding window that the plan was made for.
        dropout: of the attention weights.
        scale: factor of the scores; None: 1 / sqrt(size).

    Returns:
        [tokens, 1, heads * value size].
    """
    outputs: list[torch.Tensor] = []
    parts = zip(
        _take(query, plan, plan.queries, [block.num_queries for block in plan.blocks]),
        _take(key, plan, plan.keys, [block.num_keys for block in plan.blocks]),
        _take(value, plan, plan.keys, [block.num_keys for block in plan.blocks]),
        strict=True,
    )
    for block, (queries, keys, values) in zip(plan.blocks, parts, strict=True):
        mask = block.window_mask if is_windowed else block.mask
        if dropout == 0.0 and is_short(queries, keys):
            context = attend_short(queries, keys, values, mask, offset=block.offset, scale=scale)
        else:
            context = attend_fused(queries, keys, values, mask, dropout=dropout, scale=scale)
        outputs.append(context.transpose(1, 2).reshape(block.batch * block.num_queries, -1))
    heads, size = query.shape[-2], value.shape[-1]
    if not outputs:
        return query.new_zeros((len(query), 1, heads * size))
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    if plan.restore is not None:
        flat = functional.embedding(plan.restore, flat)
    return flat.view(-1, 1, heads * size)


def _take(
    heads: torch.Tensor, plan: AttentionPlan, indices: torch.Tensor | None, lengths: Sequence[int]
) -> list[torch.Tensor]:
    """[tokens, 1, heads, size] as [batch, heads, tokens of each, size] for each block.

    What has to be gathered is gathered for all blocks at once: its gradient is one pass, too.
    """
    count, size = heads.shape[-2:]
    flat = heads.reshape(-1, count * size)
    sizes = [block.batch * n for block, n in zip(plan.blocks, lengths, strict=True)]
    if indices is not None:
        # The gradient of an embedding adds up rows that are taken more than once, and does so fast.
        parts = functional.embedding(indices, flat).split(sizes)
    else:
        parts = [
            flat.narrow(0, block.first or 0, size)
            for block, size in zip(plan.blocks, sizes, strict=True)
        ]
    return [
        part.view(block.batch, -1, count, size).transpose(1, 2)
        for block, part in zip(plan.blocks, parts, strict=True)
    ]


def _gather_keys(
    key: torch.Tensor, value: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all context-parallel ranks, in the order of the ranks."""
    from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

    if key.shape[-1] != value.shape[-1]:
        gather: Any = gather_from_sequence_parallel_region
        return gather(key.contiguous(), group=group), gather(value.contiguous(), group=group)
    both = torch.cat([key, value], dim=2)
    gathered: Any = gather_from_sequence_parallel_region(both, group=group)
    groups = key.shape[2]
    return gathered[:, :, :groups], gathered[:, :, groups:]
