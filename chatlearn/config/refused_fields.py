"""Megatron's fields that nothing here acts on, with what to do instead; refused by name.

Every field of `megatron_fields.py` was followed to the code that reads it in Megatron-Core 0.16.1.
One stands here where that code never runs under our modules, layers, loss and schedule, or where
it runs and gives wrong results with them. A field that is not here is passed on and acts.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["REFUSED_FIELDS", "REFUSED_PREFIXES", "find_refused_fields", "why_refused"]

_CONTEXT = "keys and values are gathered; set context_parallel_size only"
_FSDP = "use use_distributed_optimizer"
_GENERATION = "generation has a key-value cache of its own; see generation"
_HYBRID = "only attention layers are built; leave it out"
_LOSS = "losses are computed without Megatron's; leave it out"
_NORM = "the norm is torch's or Transformer Engine's; leave it out"
_OFFLOAD = "the optimizer stays on the device; use use_distributed_optimizer"
_OVERLAP = "layers of two micro-batches do not overlap; leave it out"
_PRECISION = "use bf16"

REFUSED_PREFIXES: dict[str, str] = {
    "cuda_graph": "CUDA graphs are not captured; leave it out",
    "dsa": _HYBRID,
    "fp4": _PRECISION,
    "fp8": _PRECISION,
    "fsdp": _FSDP,
    "linear": _HYBRID,
    "mamba": _HYBRID,
    "mtp": "only the next token is predicted; leave it out",
    "muon": "the optimizer is adam or sgd",
    "qk_clip": "use qk_layernorm",
    "tp_comm": "Transformer Engine's overlap buffers are not set up; leave it out",
}
REFUSED_FIELDS: dict[str, str] = {
    "activation_func_fp8_input_store": _PRECISION,
    "align_param_gather": "overlap_param_gather is not there; leave it out",
    "apply_query_key_layer_scaling": "it serves fp16 only; use bf16",
    "apply_residual_connection_post_layernorm": "Megatron-Core ignores it; leave it out",
    "async_tensor_model_parallel_allreduce": "Megatron-Core ignores it; leave it out",
    "barrier_with_L1_time": "timeline.json in the run folder shows every stage",
    "batch_invariant_mode": "use runtime.deterministic",
    "cache_mla_latents": _GENERATION,
    "calculate_per_token_loss": "losses are already means over the global batch's tokens",
    "cp_comm_type": _CONTEXT,
    "cross_entropy_fusion_impl": _LOSS,
    "cross_entropy_loss_fusion": _LOSS,
    "data_parallel_sharding_strategy": _FSDP,
    "delay_wgrad_compute": _OVERLAP,
    "disable_parameter_transpose_cache": _PRECISION,
    "embedding_init_method_std": "use init_method_std",
    "enable_autocast": _PRECISION,
    "enable_cuda_graph": REFUSED_PREFIXES["cuda_graph"],
    "ep_overlap_early_attn_memory_release": _OVERLAP,
    "experimental_attention_variant": _HYBRID,
    "external_cuda_graph": REFUSED_PREFIXES["cuda_graph"],
    "first_last_layers_bf16": _PRECISION,
    "flash_decode": _GENERATION,
    "fp16": _PRECISION,
    "fp32_residual_connection": "Megatron-Core rounds to bf16 in every layer; leave it out",
    "gradient_reduce_div_fusion": _FSDP,
    "heterogeneous_block_specs": "all layers have the same sizes; leave it out",
    "hierarchical_context_parallel_sizes": _CONTEXT,
    "hybrid_context_parallel": _CONTEXT,
    "hysteresis": _PRECISION,
    "inference_fuse_tp_communication": _GENERATION,
    "inference_rng_tracker": _GENERATION,
    "inference_sampling_seed": "use runtime.seed",
    "init_model_with_meta_device": _FSDP,
    "initial_loss_scale": _PRECISION,
    "is_hybrid_model": _HYBRID,
    "keep_fp8_transpose_cache": _FSDP,
    "kitchen_attention_backend": "leave it out",
    "log_max_attention_logit": "it is not reported; leave it out",
    "log_num_zeros_in_grad": "it is not reported; leave it out",
    "loss_scale_window": _PRECISION,
    "masked_softmax_fusion": "attention is torch's or Transformer Engine's; leave it out",
    "max_seqlen_per_dp_cp_rank": _CONTEXT,
    "memory_efficient_layer_norm": _NORM,
    "min_loss_scale": _PRECISION,
    "mlp_chunks_for_prefill": _GENERATION,
    "moe_deepep_num_sms": "the dispatcher is alltoall or allgather; leave it out",
    "moe_enable_deepep": "the dispatcher is alltoall or allgather; leave it out",
    "moe_enable_routing_replay": "routes are not replayed; leave it out",
    "moe_extended_tp": "use expert_tensor_parallel_size",
    "moe_flex_dispatcher_backend": "the dispatcher is alltoall or allgather; leave it out",
    "moe_hybridep_num_sms": "the dispatcher is alltoall or allgather; leave it out",
    "moe_per_layer_logging": "it is not reported; leave it out",
    "moe_router_padding_for_fp8": _PRECISION,
    "moe_router_padding_for_quantization": _PRECISION,
    "moe_router_topk_limited_devices": "use moe_router_group_topk",
    "moe_token_dropping": "use moe_expert_capacity_factor",
    "moe_use_legacy_grouped_gemm": "use moe_grouped_gemm",
    "mrope_section": "positions are rope, learned_absolute or none; leave it out",
    "num_distributed_optimizer_instances": "there is one; leave it out",
    "num_layers_at_end_in_bf16": _PRECISION,
    "num_layers_at_start_in_bf16": _PRECISION,
    "optimizer_cpu_offload": _OFFLOAD,
    "optimizer_offload_fraction": _OFFLOAD,
    "outer_dp_sharding_strategy": _FSDP,
    "overlap_cpu_optimizer_d2h_h2d": _OFFLOAD,
    "overlap_moe_expert_parallel_comm": _OVERLAP,
    "overlap_param_gather": "weight sync must see whole parameters; leave it out",
    "overlap_param_gather_with_optimizer_step": "weight sync needs whole parameters; leave it out",
    "persist_layer_norm": _NORM,
    "pin_cpu_grads": _OFFLOAD,
    "pin_cpu_params": _OFFLOAD,
    "pipeline_model_parallel_comm_backend": "it is NCCL on GPUs and gloo on CPUs; leave it out",
    "preserve_fp32_weights": _FSDP,
    "qk_l2_norm": "use qk_layernorm",
    "reuse_grad_buf_for_mxfp8_param_ag": _PRECISION,
    "suggested_communication_unit_size": _FSDP,
    "symmetric_ar_type": _GENERATION,
    "tp_only_amax_red": _PRECISION,
    "transformer_impl": "it follows from the device: Transformer Engine on GPUs where installed",
    "use_custom_fsdp": _FSDP,
    "use_fused_weighted_squared_relu": "the MLP is gated SiLU or GELU (swiglu); leave it out",
    "use_inference_optimized_layers": _GENERATION,
    "use_kitchen": "leave it out",
    "use_kitchen_attention": "leave it out",
    "use_mamba_mem_eff_path": _HYBRID,
    "use_megatron_fsdp": _FSDP,
    "use_te_activation_func": "leave it out",
    "use_te_rng_tracker": "leave it out",
    "use_torch_optimizer_for_cpu_offload": _OFFLOAD,
}
# What only multi-latent attention has.
_LATENT_FIELDS = frozenset(
    {
        "beta_fast",
        "beta_slow",
        "kv_lora_rank",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "q_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "rope_type",
        "rotary_scaling_factor",
        "v_head_dim",
    }
)
# What it does not have.
_NOT_LATENT = {
    "add_bias_linear": "its projections have no biases; leave it out",
    "add_qkv_bias": "its projections have no biases; leave it out",
    "kv_channels": "use qk_head_dim and v_head_dim",
    "num_query_groups": "each head has keys of its own; leave it out",
    "rope_scaling": "use rope_type: yarn",
    "rotary_interleaved": "neighbours are always turned together; leave it out",
    "window_size": "it has no window; leave it out",
}
# These two are so already; any other value would have no effect.
_FIXED: dict[str, tuple[object, str]] = {
    "attention_softmax_in_fp32": (True, "attention's softmax is always in float32: leave it out"),
    "perform_initialization": (True, "it breaks the gradient norm: leave it out"),
    "softmax_type": ("vanilla", "attention has the usual softmax: leave it out"),
}
_PREFIX = re.compile("|".join(f"(?P<{name}>{name}(_|$))" for name in REFUSED_PREFIXES))


def why_refused(name: str) -> str | None:
    """What to do instead of setting this field; None where it may be set."""
    remedy = REFUSED_FIELDS.get(name)
    if (
        remedy is None
        and (found := _PREFIX.match(name)) is not None
        and found.lastgroup is not None
    ):
        remedy = REFUSED_PREFIXES[found.lastgroup]
    return remedy


def find_refused_fields(path: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """One line for each field that is set and has no effect; `path` is `models.<name>`.

    A field that is switched off (null, false, 0) is no wish and stays.
    """
    is_latent = bool(fields.get("multi_latent_attention"))
    for name, value in fields.items():
        if name in _LATENT_FIELDS and value and not is_latent:
            yield f"{path}: {name} is for multi_latent_attention: true"
        if name in _NOT_LATENT and value and is_latent:
            yield f"{path}: {name} with multi_latent_attention: {_NOT_LATENT[name]}"
        remedy = why_refused(name)
        if remedy is not None and value:
            yield f"{path}: {name} is not supported yet: {remedy}"
        if name in _FIXED and value is not None and value != _FIXED[name][0]:
            yield f"{path}: {name}={value!r}: {_FIXED[name][1]}"
