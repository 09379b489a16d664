"""The sizes that decide which weights a model has, read from the flat fields of the config. Pure.

Defaults are those of `megatron_adapters.model_config`, then Megatron-Core's own (0.16.1).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from chatlearn.config.expert_layers import find_expert_layers
from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout

__all__ = [
    "Architecture",
    "ExpertSizes",
    "GroupedAttention",
    "Head",
    "LatentAttention",
    "read_architecture",
]

Head = Literal["lm", "scalar"]

_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "max_sequence_length",
)
# Fields that change which weights there are, or how they lie, in ways not described here.
_LIVE_ONLY = (
    "experimental_attention_variant",
    "fp4",
    "fp8",
    "heterogeneous_block_specs",
    "is_hybrid_model",
    "linear_attention_freq",
    "moe_latent_size",
    "mtp_num_layers",
    "use_megatron_fsdp",
)


@dataclass(frozen=True)
class GroupedAttention:
    """Sizes of grouped-query attention; `head_size` is Megatron's `kv_channels`."""

    num_heads: int
    num_groups: int
    head_size: int
    has_output_gate: bool

    @property
    def query_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_size

    @property
    def fused_size(self) -> int:
        """Rows of the fused projection to queries, keys and values."""
        gate = self.query_size if self.has_output_gate else 0
        return self.query_size + 2 * self.num_groups * self.head_size + gate


@dataclass(frozen=True)
class LatentAttention:
    """Sizes of multi-latent attention (DeepSeek-AI 2024, arXiv:2405.04434).

    Attributes:
        num_heads: query heads.
        query_rank: rank of the compressed query; None: the query is not compressed.
        key_value_rank: rank of the compressed keys and values.
        head_size: part of a head's query and key without position.
        position_size: part with rotary position.
        value_size: width of a head's value.
    """

    num_heads: int
    query_rank: int | None
    key_value_rank: int
    head_size: int
    position_size: int
    value_size: int


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of a mixture-of-experts layer.

    Attributes:
        num_experts: routed experts of a layer.
        ffn_size: inner width of one.
        shared_ffn_size: inner width of the shared experts together; None: there are none.
        has_shared_gate: the shared experts have a gate.
        has_selection_bias: the router has a bias that balances the experts.
        is_grouped: one module holds all experts of a rank.
    """

    num_experts: int
    ffn_size: int
    shared_ffn_size: int | None
    has_shared_gate: bool
    has_selection_bias: bool
    is_grouped: bool


@dataclass(frozen=True)
class Architecture:
    """What decides a model's weights, apart from the layout.

    Attributes:
        num_layers: of the decoder.
        hidden_size: width of the residual stream.
        vocab_size: tokens without padding.
        padded_vocab_size: rows of the embedding over all tensor-parallel ranks.
        num_positions: rows of the learned position embedding; 0: there is none.
        attention: sizes of the attention.
        ffn_size: inner width of a dense MLP.
        experts: None for a dense model.
        expert_layers: for each layer, whether it has experts.
        is_gated: the MLPs have a gate.
        has_bias: linear layers have biases.
        has_qkv_bias: the projection to queries, keys and values has one.
        has_norm_bias: LayerNorm, not RMSNorm.
        has_sandwich_norms: attention and MLP have norms behind them, too.
        has_qk_norm: queries and keys (with latent attention the compressed ones) are normalised.
        is_tied: the output layer is the word embedding.
        use_te: Transformer Engine's modules make the layers.
        has_stacked_layers: the layers are one axis of a global tensor; else each has its own.
        head: of the model.
        dtype: of the parameters, in torch's name.
    """

    num_layers: int
    hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    num_positions: int
    attention: GroupedAttention | LatentAttention
    ffn_size: int
    experts: ExpertSizes | None
    expert_layers: tuple[bool, ...]
    is_gated: bool
    has_bias: bool
    has_qkv_bias: bool
    has_norm_bias: bool
    has_sandwich_norms: bool
    has_qk_norm: bool
    is_tied: bool
    use_te: bool
    has_stacked_layers: bool
    head: Head
    dtype: str


def read_architecture(
    fields: Mapping[str, Any], layout: ParallelLayout, head: Head, *, use_te: bool = False
) -> Architecture:
    """Read the sizes.

    Args:
        fields: the flat Megatron fields of one model.
        layout: its TP size decides the vocabulary's padding.
        head: `lm` or `scalar`.
        use_te: Transformer Engine's modules make the layers.

    Raises:
        ConfigError: a field is missing, or one is set that is not described here.
    """
    defaults: dict[str, Any] = {key: field.default for key, field in MODEL_FIELDS.items()}
    given = {**defaults, **fields}
    _refuse(given, use_te=use_te)
    hidden = int(given["hidden_size"])
    vocab_size = int(given["vocab_size"])
    multiple = int(given["make_vocab_size_divisible_by"] or 1) * layout.tp_size
    has_positions = given["position_embedding_type"] == "learned_absolute"
    num_layers = int(given["num_layers"])
    ffn_size = int(given.get("ffn_hidden_size") or 4 * hidden)
    experts = _read_experts(given, ffn_size)
    frequency = given.get("moe_layer_freq") or 1
    has_bias = bool(given.get("add_bias_linear"))
    is_gated = given.get("gated_linear_unit")
    own_keys = bool(given.get("hetereogenous_dist_checkpoint"))
    return Architecture(
        num_layers=num_layers,
        hidden_size=hidden,
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // multiple) * multiple,
        num_positions=int(given["max_sequence_length"]) if has_positions else 0,
        attention=_read_attention(given, hidden),
        ffn_size=ffn_size,
        experts=experts,
        expert_layers=(
            find_expert_layers(frequency, num_layers)
            if experts is not None
            else (False,) * num_layers
        ),
        is_gated=bool(given["swiglu"] if is_gated is None else is_gated),
        has_bias=has_bias,
        has_qkv_bias=has_bias or bool(given.get("add_qkv_bias")),
        has_norm_bias=_is_layer_norm(given),
        has_sandwich_norms=bool(given.get("sandwich_norms")),
        has_qk_norm=bool(given.get("qk_layernorm")),
        use_te=use_te,
        is_tied=head == "lm" and not given["untie_embeddings_and_output_weights"],
        has_stacked_layers=not (own_keys or isinstance(frequency, list | tuple) or frequency > 1),
        head=head,
        dtype="bfloat16" if given.get("bf16") else "float16" if given.get("fp16") else "float32",
    )


def _refuse(given: Mapping[str, Any], *, use_te: bool) -> None:
    missing = [key for key in _REQUIRED if given.get(key) is None]
    if missing:
        raise ConfigError(
            f"a Megatron model needs {', '.join(_REQUIRED)}; missing: {', '.join(missing)}"
        )
    unknown = [key for key in _LIVE_ONLY if given.get(key)]
    if given.get("moe_grouped_gemm") and not use_te:
        unknown.append("moe_grouped_gemm")
    if given.get("softmax_type") not in (None, "vanilla"):
        unknown.append("softmax_type")
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: what a rank of such a model holds is not known from the "
            "config; the workers describe it once they run (MegatronModule.weight_shards)"
        )


def _is_layer_norm(given: Mapping[str, Any]) -> bool:
    kind = given.get("normalization", "RMSNorm")
    if kind not in ("RMSNorm", "LayerNorm"):
        raise ConfigError(f"normalization: got {kind!r}, expected RMSNorm or LayerNorm")
    return kind == "LayerNorm"


def _read_attention(
    given: Mapping[str, Any], hidden_size: int
) -> GroupedAttention | LatentAttention:
    num_heads = int(given["num_attention_heads"])
    if given.get("multi_latent_attention"):
        query_rank = given.get("q_lora_rank", 512)
        return LatentAttention(
            num_heads=num_heads,
            query_rank=None if query_rank is None else int(query_rank),
            key_value_rank=int(given.get("kv_lora_rank", 512)),
            head_size=int(given.get("qk_head_dim", 128)),
            position_size=int(given.get("qk_pos_emb_head_dim", 64)),
            value_size=int(given.get("v_head_dim", 128)),
        )
    return GroupedAttention(
        num_heads=num_heads,
        num_groups=int(given.get("num_query_groups") or num_heads),
        head_size=int(given.get("kv_channels") or hidden_size // num_heads),
        has_output_gate=bool(given.get("attention_output_gate")),
    )


def _read_experts(given: Mapping[str, Any], ffn_size: int) -> ExpertSizes | None:
    if given.get("num_moe_experts") is None:
        return None
    shared = given.get("moe_shared_expert_intermediate_size")
    return ExpertSizes(
        num_experts=int(given["num_moe_experts"]),
        ffn_size=int(given.get("moe_ffn_hidden_size") or ffn_size),
        shared_ffn_size=None if shared is None else int(shared),
        has_shared_gate=bool(given.get("moe_shared_expert_gate")),
        has_selection_bias=bool(given.get("moe_router_enable_expert_bias")),
        is_grouped=bool(given.get("moe_grouped_gemm")),
    )
