# pyright: standard, reportPrivateImportUsage=false
"""Tiny random models of every family, made by transformers itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["TINY_MODELS", "build_tiny_model"]

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large enough that positions, masks and norms show in the logits.
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
# transformers' class stem, and what differs from the sizes above.
TINY_MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_EXPERTS, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True},
    ),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 8}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "gemma3": (
        "Gemma3Text",
        {
            "num_hidden_layers": 6,
            "head_dim": 16,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "rope_parameters": _YARN,
        },
    ),
}


def build_tiny_model(family: str, *, seed: int = 0, head: str = "lm", **changes: Any) -> Any:
    """A random float32 model of a family; vectors are random, too.

    Args:
        family: a key of `TINY_MODELS`.
        seed: of its values.
        head: `lm`, or `scalar` for a sequence classifier with one label.
        changes: further entries of its config.
    """
    import torch
    import transformers

    stem, options = TINY_MODELS[family]
    config_class: Callable[..., Any] = getattr(transformers, f"{stem}Config")
    scalar = {"num_labels": 1, "pad_token_id": 0} if head == "scalar" else {}
    config = config_class(**{**_SIZES, **options, **scalar, **changes})
    config._attn_implementation = "eager"
    kind = "ForCausalLM" if head == "lm" else "ForSequenceClassification"
    if head == "lm":
        stem = stem.removesuffix("Text")
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, stem + kind)(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1 and tensor.is_floating_point() and "rotary" not in name:
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=draw))
    return model
