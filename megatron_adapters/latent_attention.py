# pyright: standard, reportPrivateImportUsage=false
"""Multi-latent attention over packed streams and over the key-value cache.

Megatron's own works on one sequence from position 0 on; this one takes each token's position from
the stream's plan or the cache's view, and leaves the scores to the attention core.

Source: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.
"""

from copy import copy
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_adapters.attention import FusedAttention
from megatron_adapters.attention_plan import AttentionPlan
from megatron_adapters.fused import rotate
from megatron_adapters.kv_cache import CacheView

__all__ = ["LatentAttention"]


class LatentAttention(MLASelfAttention):
    """Keys and values from a compressed vector of each token, cut over heads.

    The cache holds expanded keys and values.
    """

    def __init__(self, config: Any, *arguments: Any, **options: Any) -> None:
        # Megatron's positions are not used here, and YaRN's need CUDA with context parallelism.
        plain = copy(config)
        plain.rope_type = "rope"
        super().__init__(plain, *arguments, **options)
        self.config = config
        self.rotary_pos_emb = None  # type: ignore[assignment]
        # Positions turn a part of each head only, which is done here.
        cast(FusedAttention, self.core_attention).has_rotary = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: CacheView | None,
        packed_seq_params: AttentionPlan | None = None,
        **_others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden_states: [tokens, 1, hidden], with sequence parallelism this rank's share.
            attention_mask: a CacheView, in generation.
            packed_seq_params: the plan of a packed stream, without a CacheView.

        Returns:
            [tokens, 1, hidden], and a bias to add or None.
        """
        if isinstance(attention_mask, CacheView):
            cos, sin = attention_mask.turns
        elif packed_seq_params is not None:
            cos, sin = packed_seq_params.cos, packed_seq_params.sin
        else:
            raise TypeError("attention needs the plan of a packed stream or a CacheView")
        if cos is None or sin is None:
            raise ValueError("multi-latent attention has rotary positions, got none")
        query = self._project_query(hidden_states, cos, sin)
        key, value = self._project_key_value(hidden_states, cos, sin)
        context = self.core_attention(
            query, key, value, attention_mask, packed_seq_params=packed_seq_params
        )
        return self.linear_proj(context)

    def _project_query(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        """[tokens, 1, heads, size], the elements with positions last."""
        if self.config.q_lora_rank is None:
            flat, _ = self.linear_q_proj(hidden)
        else:
            compressed, _ = self.linear_q_down_proj(hidden)
            if compressed.shape[-1] != self.config.q_lora_rank:
                compressed = self._whole(compressed)
                compressed = self._scatter(compressed)
            norm: Any = self.q_layernorm
            flat, _ = self.linear_q_up_proj(norm(compressed))
        heads = flat.view(*flat.shape[:-1], -1, self.q_head_dim)
        plain, turned = heads.split(
            [self.config.qk_head_dim, self.config.qk_pos_emb_head_dim], dim=-1
        )
        return torch.cat([plain, rotate(turned, cos, sin, is_interleaved=True)], -1)

    def _project_key_value(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[tokens, 1, heads, size] each; all heads share the elements with positions."""
        config = self.config
        both, _ = self.linear_kv_down_proj(hidden)
        width = config.kv_lora_rank + config.qk_pos_emb_head_dim
        is_cut = both.shape[-1] != width
        if is_cut:
            both = self._whole(both)
        compressed, turned = both.split([config.kv_lora_rank, config.qk_pos_emb_head_dim], dim=-1)
        if is_cut:
            compressed = self._scatter(compressed)
            # Each rank uses it for its own heads: its gradient is the sum over the ranks.
            turned = copy_to_tensor_model_parallel_region(turned, group=self.pg_collection.tp)
        norm: Any = self.kv_layernorm
        flat, _ = self.linear_kv_up_proj(norm(compressed))
        heads = flat.view(*flat.shape[:-1], -1, config.qk_head_dim + config.v_head_dim)
        plain, value = heads.split([config.qk_head_dim, config.v_head_dim], dim=-1)
        turned = rotate(turned[:, :, None].contiguous(), cos, sin, is_interleaved=True)
        turned = turned.expand(-1, -1, heads.shape[2], -1)
        return torch.cat([plain, turned], -1), value

    def _whole(self, part: torch.Tensor) -> torch.Tensor:
        """All columns of a projection that is cut over the tensor-parallel ranks."""
        return gather_from_tensor_model_parallel_region(part, group=self.pg_collection.tp)

    def _scatter(self, hidden: torch.Tensor) -> torch.Tensor:
        if not self.config.sequence_parallel:
            return hidden
        return scatter_to_sequence_parallel_region(hidden, group=self.pg_collection.tp)
