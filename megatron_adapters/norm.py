"""Norms on torch's fused functions, for machines without Transformer Engine and Apex.

Megatron's own torch norm refuses sequence parallelism; these mark their weights, so that Megatron
sums their gradients over the tensor-parallel ranks.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from megatron_adapters.fused import rms_norm

__all__ = ["FusedNorm"]


class FusedNorm(nn.Module):
    """RMSNorm or LayerNorm, as `config.normalization` says.

    Computes in float32 where the input has fewer bits. With `layernorm_zero_centered_gamma` the
    stored weight is the gain minus one.

    Args:
        config: Megatron's TransformerConfig.
        hidden_size: length of the last axis.
        eps: added to the variance.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_others: Any) -> None:
        super().__init__()
        if config.normalization not in ("RMSNorm", "LayerNorm"):
            raise ValueError(f"normalization is RMSNorm or LayerNorm, got {config.normalization!r}")
        self.eps = eps
        self.shape = (hidden_size,)
        self.is_zero_centered = bool(config.layernorm_zero_centered_gamma)
        initial = 0.0 if self.is_zero_centered else 1.0
        self.weight = nn.Parameter(torch.full(self.shape, initial, dtype=config.params_dtype))
        self.bias: nn.Parameter | None = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(self.shape, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis; shape and dtype stay."""
        offset = 1.0 if self.is_zero_centered else 0.0
        if self.bias is None:
            return rms_norm(hidden, self.weight, self.eps, offset=offset)
        weight = self.weight + offset if offset else self.weight
        return functional.layer_norm(hidden, self.shape, weight, self.bias, self.eps)
