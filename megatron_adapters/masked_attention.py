"""torch's fused attention for grouped queries, with a mask or causal.

On a GPU no fast kernel takes both a mask and fewer keys' heads than queries': torch would fall back
to one that repeats heads and writes all scores down. There the queries of a group of heads, whose
keys are the same, are laid one after another, so that keys and values stay as they are.
"""

import torch
from torch.nn import functional

__all__ = ["attend_fused"]


def attend_fused(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    folds: bool | None = None,
) -> torch.Tensor:
    """`softmax(scale * queries keys^T + mask) values`.

    Args:
        queries: [batch, heads, queries, size], heads a multiple of the groups.
        keys: [batch, groups, keys, size].
        values: [batch, groups, keys, value size].
        mask: [queries, keys] with up to two leading axes, [batch or 1, 1], added to the scores or
            boolean; None: causal.
        dropout: of the attention weights.
        scale: None: 1 / sqrt(size).
        folds: lay the heads of a group one after another; None: where a GPU needs that.

    Returns:
        [batch, heads, queries, value size].
    """
    batch, heads, length, size = queries.shape
    groups = keys.shape[1]
    if folds is None:
        folds = mask is not None and groups != heads and queries.is_cuda
    if mask is None or not folds:
        return functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=groups != heads,
        )
    times = heads // groups
    folded = queries.reshape(batch, groups, times * length, size)
    mask = mask.reshape(-1, 1, 1, *mask.shape[-2:])
    mask = mask.expand(-1, -1, times, -1, -1).flatten(2, 3)
    context = functional.scaled_dot_product_attention(
        folded, keys, values, attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return context.reshape(batch, heads, length, -1)
