# pyright: standard, reportPrivateImportUsage=false
"""Builds the model chunks of this rank, with a language or a scalar head."""

from typing import Any

import torch

from chatlearn.config.schema import LoraConfig
from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.initialization import initialize_weights
from megatron_adapters.layer_specs import build_block_spec
from megatron_adapters.model_config import MegatronSettings
from megatron_adapters.parallel_state import read_groups
from megatron_adapters.weights.architecture import Head

__all__ = ["build_model", "unwrap"]


def build_model(
    settings: MegatronSettings,
    layout: ParallelLayout,
    device: torch.device,
    *,
    head: Head,
    seed: int,
    is_trained: bool,
    lora: LoraConfig | None = None,
) -> list[Any]:
    """The model chunks of this rank (several with virtual stages), with initial values.

    Args:
        settings: Megatron's configuration objects.
        layout: of the replica.
        device: where the model lives.
        head: `lm`: logits; `scalar`: one number per token.
        seed: of the initial values, which depend on nothing else about the run or the layout.
        is_trained: wrap the chunks for gradient reduction over data-parallel ranks.
        lora: train adapters instead of the weights; None: the weights.
    """
    from megatron.core.transformer.module import Float16Module

    groups = read_groups(layout)
    chunks: list[Any] = []
    for vp_stage in range(layout.vpp_size):
        stage = vp_stage if layout.vpp_size > 1 else None
        is_first = groups.is_first_stage and vp_stage == 0
        is_last = groups.is_last_stage and vp_stage == layout.vpp_size - 1
        spec = build_block_spec(
            settings.transformer,
            stage,
            use_te=settings.use_te,
            has_sandwich_norms=settings.shape.has_sandwich_norms,
        )
        if lora is not None:
            _adapt(spec, settings, lora)
        chunk = _build_chunk(settings, spec, stage, head, is_first=is_first, is_last=is_last)
        chunks.append(chunk.to(device))
    initialize_weights(chunks, settings, seed)
    if lora is not None:
        _freeze_all_but_adapters(chunks)
        from megatron_adapters.lora.places import initialize_adapters

        initialize_adapters(chunks, seed)
    if settings.transformer.bf16 or settings.transformer.fp16:
        chunks = [Float16Module(settings.transformer, chunk) for chunk in chunks]
    if is_trained:
        from megatron.core.distributed import DistributedDataParallel

        chunks = [
            DistributedDataParallel(
                config=settings.transformer,
                ddp_config=settings.ddp,
                module=chunk,
                disable_bucketing=number > 0,
            )
            for number, chunk in enumerate(chunks)
        ]
    else:
        for chunk in chunks:
            chunk.eval().requires_grad_(requires_grad=False)
    return chunks


def unwrap(chunk: Any) -> Any:
    """The GPTModel within its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _adapt(spec: Any, settings: MegatronSettings, lora: LoraConfig) -> None:
    from megatron_adapters.lora.layers import AdapterOptions
    from megatron_adapters.lora.spec import adapt_layers

    divisor = lora.rank**0.5 if lora.use_rslora else lora.rank
    options = AdapterOptions(lora.rank, lora.alpha / divisor, lora.dropout)
    # Layers of one kind share their spec.
    for layer in {id(layer): layer for layer in spec.layer_specs}.values():
        adapt_layers(layer, settings.transformer, options, lora.target_modules)


def _freeze_all_but_adapters(chunks: list[Any]) -> None:
    """The head of a value or reward model is trained whole: it starts at zero."""
    for chunk in chunks:
        model = unwrap(chunk)
        model.is_adapted = True
        head = model.output_layer if model.post_process and model.has_scalar_head else None
        kept = set() if head is None else {id(parameter) for parameter in head.parameters()}
        for name, parameter in model.named_parameters():
            if ".adapters." not in name and id(parameter) not in kept:
                parameter.requires_grad_(requires_grad=False)


def _build_chunk(
    settings: MegatronSettings,
    spec: Any,
    vp_stage: int | None,
    head: Head,
    *,
    is_first: bool,
    is_last: bool,
) -> Any:
    from megatron_adapters.packed_model import PackedModel

    shape = settings.shape
    return PackedModel(
        real_vocab_size=shape.vocab_size,
        has_scalar_head=head == "scalar",
        config=settings.transformer,
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_sequence_length,
        pre_process=is_first,
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.is_tied and head == "lm",
        position_embedding_type=shape.position_embedding_type,
        rotary=shape.rotary,
        embedding_scale=shape.embedding_scale,
        rotary_percent=shape.rotary_percent,
        vp_stage=vp_stage,
    )
