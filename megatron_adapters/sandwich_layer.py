"""A decoder layer with norms on both sides of attention and MLP, as Gemma's."""

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_adapters.norm import FusedNorm

__all__ = ["SandwichLayer"]


class SandwichLayer(TransformerLayer):
    """Megatron's layer; what attention and MLP give is normalised before it is added."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = self.config
        size, eps = config.hidden_size, config.layernorm_epsilon
        self.post_self_attn_layernorm = FusedNorm(config, size, eps)
        self.post_mlp_layernorm = FusedNorm(config, size, eps)
        self.self_attn_bda = _normalised(self.self_attn_bda, self.post_self_attn_layernorm)
        self.mlp_bda = _normalised(self.mlp_bda, self.post_mlp_layernorm)


def _normalised(build: Callable[..., Callable[..., Any]], norm: FusedNorm) -> Callable[..., Any]:
    """Megatron's bias-dropout-add, with a norm before the addition."""

    def build_normalised(*options: Any) -> Callable[..., Any]:
        add = build(*options)

        def add_normalised(output: Any, residual: Any, dropout: float) -> Any:
            hidden, bias = output
            if bias is not None:
                hidden = hidden + bias
            return add((norm(hidden), None), residual, dropout)

        return add_normalised

    return build_normalised
