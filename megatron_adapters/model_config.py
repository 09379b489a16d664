"""From the flat fields of the config to Megatron's configuration objects."""

import dataclasses
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.fused import gelu_tanh
from megatron_adapters.layer_specs import has_transformer_engine
from megatron_adapters.rotary import RotaryOptions, Yarn

__all__ = ["ModelShape", "MegatronSettings", "build_settings"]

_ACTIVATIONS = {"silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": gelu_tanh}
_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "vocab_size",
    "max_sequence_length",
)


@dataclass(frozen=True)
class ModelShape:
    """What GPTModel takes besides its TransformerConfig."""

    vocab_size: int
    padded_vocab_size: int
    max_sequence_length: int
    position_embedding_type: str
    rotary: RotaryOptions
    rotary_percent: float
    is_tied: bool
    embedding_scale: float | None = None
    has_sandwich_norms: bool = False


@dataclass(frozen=True)
class MegatronSettings:
    """Megatron's configuration objects of one model.

    Attributes:
        transformer: TransformerConfig.
        optimizer: OptimizerConfig.
        ddp: DistributedDataParallelConfig.
        shape: what GPTModel takes besides.
        schedule: the learning rate schedule's fields.
        use_te: the layers are Transformer Engine's modules.
    """

    transformer: Any
    optimizer: Any
    ddp: Any
    shape: ModelShape
    schedule: Mapping[str, Any]
    use_te: bool = False


def build_settings(
    name: str,
    fields: Mapping[str, Any],
    layout: ParallelLayout,
    device: torch.device,
    *,
    is_generating: bool = False,
) -> MegatronSettings:
    """Build the configuration objects.

    Fields that are left out get the defaults of a Llama-like decoder: RMSNorm, gated SiLU, rotary
    positions, no biases, no dropout, untied embeddings.

    Args:
        name: the model, for messages.
        fields: `models.<name>`'s Megatron fields.
        layout: of the replica.
        device: where the model will live.
        is_generating: the model decodes token by token: no sequence parallelism, which is of no
            use there.

    Raises:
        ConfigError: a required field is missing, or Megatron refuses a combination.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    missing = [key for key in _REQUIRED if fields.get(key) is None]
    if missing:
        raise ConfigError(
            f"models.{name}: a Megatron model needs {', '.join(_REQUIRED)}; "
            f"missing: {', '.join(missing)}"
        )
    own = {key: fields.get(key, field.default) for key, field in MODEL_FIELDS.items()}
    dtype = _dtype(fields)
    given = {key: value for key, value in fields.items() if key not in MODEL_FIELDS}
    transformer = {
        **_transformer_defaults(fields, layout, device, dtype),
        **_of(_transformer_class(fields), given),
    }
    if is_generating:
        transformer["sequence_parallel"] = False
        # Each row of a decoding batch has positions of its own, which the fused kernels lack.
        transformer["apply_rope_fusion"] = transformer["fused_single_qkv_rope"] = False
        if layout.vpp_size > 1:
            raise ConfigError(
                f"models.{name}: a model that generates has no virtual stages: leave "
                "virtual_pipeline_model_parallel_size out"
            )
    transformer["perform_initialization"] = True
    if device.type == "cpu":
        # gloo pairs messages of one peer by order: batched p2p mixes up virtual stages silently.
        transformer["batch_p2p_comm"] = False
    optimizer = {"lr": 1e-5, "min_lr": 0.0, "params_dtype": dtype, "bf16": dtype == torch.bfloat16}
    optimizer.update({"fp16": dtype == torch.float16, **_of(OptimizerConfig, given)})
    ddp = {"grad_reduce_in_fp32": True, **_of(DistributedDataParallelConfig, given)}
    ddp["use_distributed_optimizer"] = bool(given.get("use_distributed_optimizer", False))
    optimizer["use_distributed_optimizer"] = ddp["use_distributed_optimizer"]
    has_te = importlib.util.find_spec("transformer_engine") is not None
    if "layernorm" in (fields.get("recompute_modules") or ()) and not has_te:
        raise ConfigError(
            f"models.{name}: recompute_modules: layernorm needs Transformer Engine: leave it out"
        )
    try:
        with warnings.catch_warnings():
            # Megatron warns about its own defaults.
            warnings.simplefilter("ignore", UserWarning)
            settings = _build(transformer, optimizer, ddp, own, layout)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"models.{name}: Megatron refuses the fields: {error}") from error
    if not (has_te and device.type == "cuda") and _is_plain_swiglu(settings.transformer):
        # Megatron's own switch for an activation that is a module; the layer spec has ours.
        settings.transformer.use_te_activation_func = True
    return replace(settings, use_te=has_transformer_engine(device, fields))


def _build(
    transformer: dict[str, Any],
    optimizer: dict[str, Any],
    ddp: dict[str, Any],
    own: Mapping[str, Any],
    layout: ParallelLayout,
) -> MegatronSettings:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    config = _transformer_class(transformer)(**transformer)
    return MegatronSettings(
        config,
        OptimizerConfig(**optimizer),
        DistributedDataParallelConfig(**ddp),
        _shape(own, layout, config),
        {key: value for key, value in own.items() if key.startswith("lr_")},
    )


def _transformer_class(fields: Mapping[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    return MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig


def _transformer_defaults(
    fields: Mapping[str, Any],
    layout: ParallelLayout,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    is_gated = fields.get("swiglu", MODEL_FIELDS["swiglu"].default)
    activation = fields.get("activation") or ("silu" if is_gated else "gelu")
    defaults: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp_size,
        "pipeline_model_parallel_size": layout.pp_size,
        "virtual_pipeline_model_parallel_size": layout.vpp_size if layout.vpp_size > 1 else None,
        "context_parallel_size": layout.cp_size,
        "expert_model_parallel_size": layout.ep_size,
        "expert_tensor_parallel_size": layout.etp_size,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "normalization": "RMSNorm",
        "gated_linear_unit": is_gated,
        "activation_func": _ACTIVATIONS[activation],
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": _has_fused_accumulation(device),
        "apply_rope_fusion": False,
        "variable_seq_lengths": False,
        "use_cpu_initialization": device.type == "cpu",
        # Megatron marks tensor-parallel parameters only where it initialises them; without the
        # marks the gradient norm leaves out all shards but the first, in silence.
        "perform_initialization": True,
    }
    if "num_moe_experts" in fields:
        defaults["moe_token_dispatcher_type"] = "alltoall"
    return defaults


def _is_plain_swiglu(config: Any) -> bool:
    is_gated_silu = config.gated_linear_unit and config.activation_func is functional.silu
    is_plain = config.activation_func_clamp_value is None and config.glu_linear_offset == 0
    return is_gated_silu and is_plain and not config.bias_activation_fusion


def _yarn(config: Any) -> Yarn | None:
    if not config.multi_latent_attention or config.rope_type != "yarn":
        return None
    return Yarn(
        config.rotary_scaling_factor,
        config.original_max_position_embeddings,
        config.beta_fast,
        config.beta_slow,
        config.mscale,
        config.mscale_all_dim,
    )


def _shape(own: Mapping[str, Any], layout: ParallelLayout, transformer: Any) -> ModelShape:
    multiple = own["make_vocab_size_divisible_by"] * layout.tp_size
    return ModelShape(
        vocab_size=own["vocab_size"],
        padded_vocab_size=-(-own["vocab_size"] // multiple) * multiple,
        max_sequence_length=own["max_sequence_length"],
        position_embedding_type=own["position_embedding_type"],
        rotary=RotaryOptions(
            float(own["rotary_base"]),
            own["rotary_base_local"],
            own["rope_scaling"],
            _yarn(transformer),
        ),
        rotary_percent=own["rotary_percent"],
        is_tied=not own["untie_embeddings_and_output_weights"],
        embedding_scale=own["embedding_scale"],
        has_sandwich_norms=own["sandwich_norms"],
    )


def _of(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: value for key, value in given.items() if key in names}


def _dtype(fields: Mapping[str, Any]) -> torch.dtype:
    if fields.get("bf16"):
        return torch.bfloat16
    return torch.float16 if fields.get("fp16") else torch.float32


def _has_fused_accumulation(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
