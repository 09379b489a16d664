"""The parameters of each part of a model, with their whole shapes and how they are cut. Pure.

Names are those of Megatron-Core 0.16.1's local modules, or of Transformer Engine's where they make
the layers: there a norm before a linear layer is a part of it (`layer_norm_weight`), and the down
projections of latent attention are whole on every rank. The latter are read from Megatron's
source; no test has run them.
"""

from dataclasses import dataclass

from megatron_adapters.weights.architecture import (
    Architecture,
    ExpertSizes,
    GroupedAttention,
    LatentAttention,
)

__all__ = [
    "Parameter",
    "embedding_parameters",
    "expert_parameters",
    "final_parameters",
    "layer_parameters",
]

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a layer, an expert or the model.

    Attributes:
        name: within its layer, expert or model.
        shape: over all tensor-parallel ranks.
        axis: the one that is cut over them; None: each holds all.
        num_parts: parts of equal size that lie one after the other along the axis, each cut by
            itself (gate and up).
        dtype: None: the model's.
        key: the global name within layer, expert or model, where it differs from `name`.
        num_rows: leading rows that count; those beyond are padding. None: all.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    num_parts: int = 1
    dtype: str | None = None
    key: str | None = None
    num_rows: int | None = None


def embedding_parameters(model: Architecture) -> list[Parameter]:
    """Of the first chunk, before its layers."""
    found = [_vocabulary(model, EMBEDDING)]
    if model.num_positions:
        shape = (model.num_positions, model.hidden_size)
        found.append(Parameter("embedding.position_embeddings.weight", shape))
    return found


def final_parameters(model: Architecture, *, has_embedding: bool) -> list[Parameter]:
    """Of the last chunk, after its layers.

    Args:
        model: the sizes.
        has_embedding: the last chunk is the first one, too.
    """
    found = _norm(model, "decoder.final_layernorm", model.hidden_size)
    if model.head == "scalar":
        found.append(Parameter(OUTPUT, (1, model.hidden_size)))
    elif not model.is_tied:
        found.append(_vocabulary(model, OUTPUT))
    elif not has_embedding:
        # Tied across stages: the last one has a copy of the embedding.
        found.append(_vocabulary(model, OUTPUT, key=EMBEDDING))
    return found


def layer_parameters(model: Architecture, experts: ExpertSizes | None) -> list[Parameter]:
    """Of one layer, apart from its routed experts.

    Args:
        model: the sizes.
        experts: those of the layer; None: it is dense.
    """
    hidden = model.hidden_size
    if isinstance(model.attention, LatentAttention):
        found = _norm(model, "input_layernorm", hidden)
        found += _latent_attention(model, model.attention)
    else:
        found = _norm(model, "input_layernorm", hidden, before="self_attention.linear_qkv")
        found += _grouped_attention(model, model.attention)
    if model.has_sandwich_norms:
        found += _norm(model, "post_self_attn_layernorm", hidden)
        found += _norm(model, "post_mlp_layernorm", hidden)
    if experts is None:
        found += _norm(model, "pre_mlp_layernorm", hidden, before="mlp.linear_fc1")
        return found + _mlp(model, "mlp.", model.ffn_size)
    found += _norm(model, "pre_mlp_layernorm", hidden)
    found.append(Parameter("mlp.router.weight", (experts.num_experts, hidden)))
    if model.has_bias:
        found.append(Parameter("mlp.router.bias", (experts.num_experts,)))
    if experts.has_selection_bias:
        # A buffer, which Megatron keeps in float32 in every model.
        name = "mlp.router.expert_bias"
        found.append(Parameter(name, (experts.num_experts,), dtype="float32"))
    if experts.shared_ffn_size is not None:
        found += _mlp(model, "mlp.shared_experts.", experts.shared_ffn_size)
        if experts.has_shared_gate:
            found.append(Parameter("mlp.shared_experts.gate_weight", (1, hidden)))
    return found


def expert_parameters(model: Architecture, experts: ExpertSizes) -> list[Parameter]:
    """Of one routed expert."""
    return _mlp(model, "", experts.ffn_size)


def _vocabulary(model: Architecture, name: str, key: str | None = None) -> Parameter:
    shape = (model.padded_vocab_size, model.hidden_size)
    return Parameter(name, shape, axis=0, key=key, num_rows=model.vocab_size)


def _norm(
    model: Architecture, name: str, size: int, *, before: str | None = None
) -> list[Parameter]:
    """A norm; Transformer Engine makes it a part of the linear layer that it stands before."""
    is_fused = before is not None and model.use_te
    stem = f"{before}.layer_norm_" if is_fused else f"{name}."
    found = [Parameter(f"{stem}weight", (size,))]
    if model.has_norm_bias:
        found.append(Parameter(f"{stem}bias", (size,)))
    return found


def _mlp(model: Architecture, prefix: str, ffn_size: int) -> list[Parameter]:
    hidden, parts = model.hidden_size, 2 if model.is_gated else 1
    inner = ffn_size * parts
    found = [
        Parameter(f"{prefix}linear_fc1.weight", (inner, hidden), axis=0, num_parts=parts),
        Parameter(f"{prefix}linear_fc2.weight", (hidden, ffn_size), axis=1),
    ]
    if model.has_bias:
        found.append(Parameter(f"{prefix}linear_fc1.bias", (inner,), axis=0, num_parts=parts))
        found.append(Parameter(f"{prefix}linear_fc2.bias", (hidden,)))
    return found


def _output_projection(model: Architecture, size: int) -> list[Parameter]:
    found = [Parameter("self_attention.linear_proj.weight", (model.hidden_size, size), axis=1)]
    if model.has_bias:
        found.append(Parameter("self_attention.linear_proj.bias", (model.hidden_size,)))
    return found


def _grouped_attention(model: Architecture, sizes: GroupedAttention) -> list[Parameter]:
    inner = sizes.fused_size
    name = "self_attention.linear_qkv"
    found = _output_projection(model, sizes.query_size)
    found.append(Parameter(f"{name}.weight", (inner, model.hidden_size), axis=0))
    if model.has_qkv_bias:
        found.append(Parameter(f"{name}.bias", (inner,), axis=0))
    if model.has_qk_norm:
        found += _norm(model, "self_attention.q_layernorm", sizes.head_size)
        found += _norm(model, "self_attention.k_layernorm", sizes.head_size)
    return found


def _latent_attention(model: Architecture, sizes: LatentAttention) -> list[Parameter]:
    def column(name: str, rows: int, columns: int) -> Parameter:
        return Parameter(f"self_attention.{name}.weight", (rows, columns), axis=0)

    def down(name: str, rows: int) -> Parameter:
        axis = None if model.use_te else 0
        return Parameter(f"self_attention.{name}.weight", (rows, model.hidden_size), axis=axis)

    def norm(name: str, size: int, before: str) -> list[Parameter]:
        stem = "self_attention."
        return _norm(model, stem + name, size, before=stem + before)

    hidden, heads = model.hidden_size, sizes.num_heads
    queries = heads * (sizes.head_size + sizes.position_size)
    latent = sizes.key_value_rank
    found = _output_projection(model, heads * sizes.value_size)
    if sizes.query_rank is None:
        found.append(column("linear_q_proj", queries, hidden))
    else:
        found.append(down("linear_q_down_proj", sizes.query_rank))
        found.append(column("linear_q_up_proj", queries, sizes.query_rank))
    found.append(down("linear_kv_down_proj", latent + sizes.position_size))
    found.append(column("linear_kv_up_proj", heads * (sizes.head_size + sizes.value_size), latent))
    if model.has_qk_norm:
        if sizes.query_rank is not None:
            found += norm("q_layernorm", sizes.query_rank, "linear_q_up_proj")
        found += norm("kv_layernorm", latent, "linear_kv_up_proj")
    return found
