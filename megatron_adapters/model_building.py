# pyright: standard, reportPrivateImportUsage=false
"""Builds the model chunks of this rank, with a language or a scalar head."""

from typing import Any

import torch
from torch import nn

from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.initialization import initialize_weights
from megatron_adapters.layer_specs import build_block_spec, has_transformer_engine
from megatron_adapters.model_config import MegatronSettings
from megatron_adapters.parallel_state import read_groups
from megatron_adapters.weights.architecture import Head

__all__ = ["ScalarHead", "build_model", "unwrap"]


class ScalarHead(nn.Module):
    """One number per token: the head of value and reward models, in place of the output layer.

    The weight is whole on every tensor-parallel rank, and starts at zero.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))
        # Each rank sees a part of the sequence, so Megatron must sum the gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(
        self, hidden: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None
    ) -> tuple[torch.Tensor, None]:
        """[tokens, batch, hidden] to [tokens, batch, 1] float32, with the whole sequence."""
        del weight, runtime_gather_output
        values = nn.functional.linear(hidden.float(), self.weight.float())
        if self.config.sequence_parallel:
            from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight as a tensor that every rank holds whole."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        del metadata
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


def build_model(
    settings: MegatronSettings,
    layout: ParallelLayout,
    device: torch.device,
    *,
    head: Head,
    seed: int,
    is_trained: bool,
    use_cache: bool = False,
) -> list[Any]:
    """The model chunks of this rank (several with virtual stages), with initial values.

    Args:
        settings: Megatron's configuration objects.
        layout: of the replica.
        device: where the model lives.
        head: `lm`: logits; `scalar`: one number per token.
        seed: of the initial values, which depend on nothing else about the run or the layout.
        is_trained: wrap the chunks for gradient reduction over data-parallel ranks.
        use_cache: the model generates.
    """
    from megatron.core.transformer.module import Float16Module

    groups = read_groups(layout)
    use_te = has_transformer_engine(device)
    chunks: list[Any] = []
    for vp_stage in range(layout.vpp_size):
        stage = vp_stage if layout.vpp_size > 1 else None
        is_first = groups.is_first_stage and vp_stage == 0
        is_last = groups.is_last_stage and vp_stage == layout.vpp_size - 1
        spec = build_block_spec(settings.transformer, stage, use_cache=use_cache, use_te=use_te)
        chunk = _build_chunk(settings, spec, stage, head, is_first=is_first, is_last=is_last)
        chunks.append(chunk.to(device))
    initialize_weights(chunks, settings, seed)
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


def _build_chunk(
    settings: MegatronSettings,
    spec: Any,
    vp_stage: int | None,
    head: Head,
    *,
    is_first: bool,
    is_last: bool,
) -> Any:
    from megatron.core.models.gpt.gpt_model import GPTModel

    shape = settings.shape
    model = GPTModel(
        config=settings.transformer,
        transformer_layer_spec=spec,
        vocab_size=shape.padded_vocab_size,
        max_sequence_length=shape.max_sequence_length,
        pre_process=is_first,
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.is_tied and head == "lm",
        position_embedding_type=shape.position_embedding_type,  # type: ignore[arg-type]
        rotary_base=int(shape.rotary_base),
        rotary_percent=shape.rotary_percent,
        vp_stage=vp_stage,
    )
    if head == "scalar" and is_last:
        headed: Any = model
        headed.output_layer = ScalarHead(settings.transformer)
    return model
