"""How many parameters a Megatron model has, from its config alone. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.config.expert_layers import find_expert_layers
from chatlearn.config.model_fields import MODEL_FIELDS

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["count_parameters", "parameter_bytes"]

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
_UNKNOWN = ("multi_latent_attention", "mtp_num_layers", "experimental_attention_variant")


def count_parameters(fields: Mapping[str, Any], *, has_scalar_head: bool) -> int | None:
    """Parameters of the whole model, without the padding of the vocabulary.

    Args:
        fields: Megatron's fields of the model; those left out have the adapter's defaults.
        has_scalar_head: one number per token in place of the output layer.

    Returns:
        The count; None where a size is missing or the architecture is not known here.
    """
    own = {key: fields.get(key, field.default) for key, field in MODEL_FIELDS.items()}
    given = {**own, **fields}
    if any(given.get(key) is None for key in _REQUIRED) or any(map(given.get, _UNKNOWN)):
        return None
    hidden = given["hidden_size"]
    embedding = given["vocab_size"] * hidden
    if given["position_embedding_type"] == "learned_absolute":
        if given["max_sequence_length"] is None:
            return None
        embedding += given["max_sequence_length"] * hidden
    if has_scalar_head:
        head = hidden
    else:
        head = given["vocab_size"] * hidden * bool(given["untie_embeddings_and_output_weights"])
    norm = _norm_size(given, hidden)
    layer = _count_attention(given) + 2 * norm
    layers = given["num_layers"] * layer + _count_feed_forward(given)
    return embedding + layers + norm + head


def parameter_bytes(fields: Mapping[str, Any]) -> int:
    """Bytes of one parameter as the model holds it."""
    return 2 if fields.get("bf16") or fields.get("fp16") else 4


def _norm_size(given: Mapping[str, Any], width: int) -> int:
    return width if given.get("normalization", "RMSNorm") == "RMSNorm" else 2 * width


def _count_attention(given: Mapping[str, Any]) -> int:
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    head_size = given.get("kv_channels") or hidden // heads
    queries = heads * head_size
    keys = (given.get("num_query_groups") or heads) * head_size
    inner = queries + 2 * keys + (queries if given.get("attention_output_gate") else 0)
    has_bias = bool(given.get("add_bias_linear"))
    count = hidden * inner + queries * hidden
    count += inner * (has_bias or bool(given.get("add_qkv_bias"))) + hidden * has_bias
    if given.get("qk_layernorm"):
        count += 2 * _norm_size(given, head_size)
    return count


def _count_feed_forward(given: Mapping[str, Any]) -> int:
    """The MLPs of all layers, those of a mixture of experts with their router."""
    hidden, num_layers = given["hidden_size"], given["num_layers"]
    width = given.get("ffn_hidden_size") or 4 * hidden
    dense = _count_mlp(given, width)
    experts = given.get("num_moe_experts")
    if not experts:
        return num_layers * dense
    sparse = hidden * experts
    sparse += experts * _count_mlp(given, given.get("moe_ffn_hidden_size") or width)
    shared = given.get("moe_shared_expert_intermediate_size")
    sparse += _count_mlp(given, shared) if shared else 0
    sparse += hidden if shared and given.get("moe_shared_expert_gate") else 0
    num_sparse = sum(find_expert_layers(given.get("moe_layer_freq") or 1, num_layers))
    return num_sparse * sparse + (num_layers - num_sparse) * dense


def _count_mlp(given: Mapping[str, Any], width: int) -> int:
    hidden = given["hidden_size"]
    inner = width * (2 if given.get("gated_linear_unit", given["swiglu"]) else 1)
    bias = inner + hidden if given.get("add_bias_linear") else 0
    return hidden * inner + width * hidden + bias
