"""Tables of names: where Megatron's parameters lie in transformers' live models and files. Pure.

A table maps the stem of a Megatron name (without `.weight` or `.bias`) to stems there. Several
stems are parts that Megatron holds in one tensor: query, key and value, or the gate's rows and
then the up projection's. Adding a family of other names is adding a table, see `NAMINGS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

__all__ = ["NAMINGS", "Naming", "in_files"]

Stems = tuple[str, ...]


@dataclass(frozen=True)
class Naming:
    """The names of one family of models.

    Attributes:
        outer: stems of what lies around the layers; `score` is that of a scalar head.
        layer: stems within a layer.
        expert: stems within an expert, or within all experts of a layer.
        expert_prefix: before them, within the layer; with `{expert}` each expert has tensors of
            its own, without it they are stacked, gate on up, as Megatron's are.
        has_expert_suffix: names within experts end with `.weight`.
    """

    outer: Mapping[str, str]
    layer: Mapping[str, Stems]
    expert: Mapping[str, Stems]
    expert_prefix: str
    has_expert_suffix: bool = True


_GATED: Stems = ("gate_proj", "up_proj")


def _within(prefix: str, stems: Stems) -> Stems:
    return tuple(f"{prefix}.{stem}" for stem in stems)


_OUTER = {
    "embedding.word_embeddings": "model.embed_tokens",
    "decoder.final_layernorm": "model.norm",
    "output_layer": "lm_head",
    "score": "score",
}
# Without the norms before and after MLPs, on whose names the families disagree.
_LAYER = {
    "input_layernorm": ("input_layernorm",),
    "self_attention.linear_qkv": _within("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention.q_layernorm": ("self_attn.q_norm",),
    "self_attention.k_layernorm": ("self_attn.k_norm",),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": _within("mlp", _GATED),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
_LLAMA_LAYER = {
    **_LAYER,
    "pre_mlp_layernorm": ("post_attention_layernorm",),
    "mlp.router": ("mlp.gate",),
    "mlp.router.expert_bias": ("mlp.gate.e_score_correction_bias",),
    "mlp.shared_experts.linear_fc1": _within("mlp.shared_experts", _GATED),
    "mlp.shared_experts.linear_fc2": ("mlp.shared_experts.down_proj",),
}
_STACKED = {"linear_fc1": ("gate_up_proj",), "linear_fc2": ("down_proj",)}

# Llama, Mistral, Qwen2, Qwen3, and with experts Mixtral, Qwen3-MoE and GLM-4-MoE.
_LLAMA = Naming(_OUTER, _LLAMA_LAYER, _STACKED, "mlp.experts.", has_expert_suffix=False)
# One shared expert behind a gate.
_QWEN2_MOE = replace(
    _LLAMA,
    layer={
        **_LLAMA_LAYER,
        "mlp.shared_experts.linear_fc1": _within("mlp.shared_expert", _GATED),
        "mlp.shared_experts.linear_fc2": ("mlp.shared_expert.down_proj",),
        "mlp.shared_experts.gate_weight": ("mlp.shared_expert_gate.weight",),
    },
)
# Norms before and after both halves of a layer.
_GEMMA = replace(
    _LLAMA,
    layer={
        **_LAYER,
        "post_self_attn_layernorm": ("post_attention_layernorm",),
        "pre_mlp_layernorm": ("pre_feedforward_layernorm",),
        "post_mlp_layernorm": ("post_feedforward_layernorm",),
    },
)
# Multi-latent attention.
_DEEPSEEK = replace(
    _LLAMA,
    layer={
        **{stem: new for stem, new in _LLAMA_LAYER.items() if "self_attention" not in stem},
        "self_attention.linear_q_proj": ("self_attn.q_proj",),
        "self_attention.linear_q_down_proj": ("self_attn.q_a_proj",),
        "self_attention.q_layernorm": ("self_attn.q_a_layernorm",),
        "self_attention.linear_q_up_proj": ("self_attn.q_b_proj",),
        "self_attention.linear_kv_down_proj": ("self_attn.kv_a_proj_with_mqa",),
        "self_attention.kv_layernorm": ("self_attn.kv_a_layernorm",),
        "self_attention.linear_kv_up_proj": ("self_attn.kv_b_proj",),
        "self_attention.linear_proj": ("self_attn.o_proj",),
    },
)

# By the name of the family that has them; a model has the names of the first table that knows all
# of its parameters.
NAMINGS: Mapping[str, Naming] = {
    "llama": _LLAMA,
    "qwen2_moe": _QWEN2_MOE,
    "gemma": _GEMMA,
    "deepseek": _DEEPSEEK,
}


@dataclass(frozen=True)
class _ExpertFiles:
    """How files name a layer's experts and their router."""

    prefix: str = "mlp.experts.{expert}."
    stems: Mapping[str, Stems] = field(
        default_factory=lambda: {"linear_fc1": _GATED, "linear_fc2": ("down_proj",)}
    )
    router: str = "mlp.gate"


_EXPERT_FILES = _ExpertFiles()
_MIXTRAL_FILES = _ExpertFiles(
    "block_sparse_moe.experts.{expert}.",
    {"linear_fc1": ("w1", "w3"), "linear_fc2": ("w2",)},
    "block_sparse_moe.gate",
)


def in_files(naming: Naming, *, is_mixtral: bool = False) -> Naming:
    """The names of files of a family whose live models have those of `naming`.

    transformers 5 stacks the experts of a live model; in files each has tensors of its own.
    """
    experts = _MIXTRAL_FILES if is_mixtral else _EXPERT_FILES
    layer = dict(naming.layer)
    if "mlp.router" in layer:
        layer["mlp.router"] = (experts.router,)
    return replace(
        naming,
        layer=layer,
        expert=experts.stems,
        expert_prefix=experts.prefix,
        has_expert_suffix=True,
    )
