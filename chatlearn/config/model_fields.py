"""The flat fields of a Megatron model that are not fields of Megatron-Core's dataclasses."""

from dataclasses import dataclass

__all__ = ["MODEL_FIELDS", "ModelField"]


@dataclass(frozen=True)
class ModelField:
    """One field: the kinds that YAML may give, its default, and what it means."""

    kinds: tuple[str, ...]
    default: object
    meaning: str


MODEL_FIELDS: dict[str, ModelField] = {
    "vocab_size": ModelField(("int",), None, "tokens of the vocabulary, without padding"),
    "max_sequence_length": ModelField(("int",), None, "longest prompt and response, tokens"),
    "position_embedding_type": ModelField(("str",), "rope", "rope, learned_absolute or none"),
    "rotary_base": ModelField(("int", "float"), 10000, "base of the rotary frequencies"),
    "rotary_base_local": ModelField(
        ("int", "float"), None, "base in layers with a sliding window; unset: `rotary_base`"
    ),
    "rope_scaling": ModelField(
        ("dict",),
        None,
        "stretches the positions of layers without a window, in transformers' words: rope_type "
        "`linear` with factor, or `llama3` with factor, low_freq_factor, high_freq_factor and "
        "original_max_position_embeddings",
    ),
    "rotary_percent": ModelField(("float",), 1.0, "share of a head that is rotated"),
    "untie_embeddings_and_output_weights": ModelField(
        ("bool",), True, "the output layer has weights of its own"
    ),
    "make_vocab_size_divisible_by": ModelField(
        ("int",), 1, "the vocabulary is padded to a multiple of this times the TP size"
    ),
    "swiglu": ModelField(("bool",), True, "gated SiLU in the MLP; false: GELU"),
    "activation": ModelField(
        ("str",),
        None,
        "silu, gelu or gelu_tanh in the MLP, with a gate where `swiglu` or `gated_linear_unit` is "
        "true; unset: silu with swiglu, else gelu",
    ),
    "sandwich_norms": ModelField(
        ("bool",), False, "attention and MLP have a norm behind them, too (Gemma)"
    ),
    "embedding_scale": ModelField(("float",), None, "factor of the embeddings (Gemma)"),
    "lr_warmup_steps": ModelField(("int",), 0, "updates of linear warm-up"),
    "lr_decay_steps": ModelField(("int",), None, "updates until `min_lr`; unset: constant"),
    "lr_decay_style": ModelField(
        ("str",), "constant", "constant, linear, cosine, inverse-square-root or WSD"
    ),
    "lr_wsd_decay_steps": ModelField(("int",), None, "updates of the decay at the end (WSD)"),
    "lr_wsd_decay_style": ModelField(("str",), "linear", "shape of the decay at the end (WSD)"),
}
