# pyright: standard, reportPrivateImportUsage=false
"""Runs micro-batches through Megatron's pipeline schedules, forward only or with gradients."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_adapters.packing import PackedBatch
from megatron_adapters.parallel_state import ParallelGroups

__all__ = ["MicroBatchResult", "run_forward", "run_forward_backward"]


@dataclass(frozen=True)
class MicroBatchResult:
    """What a loss function gives on the last stage.

    Attributes:
        loss: scalar with gradient; the sum over micro-batches and ranks is the batch's loss.
        kept: detached tensors to hand to the caller.
    """

    loss: torch.Tensor
    kept: Any


LossFunction = Callable[[torch.Tensor, PackedBatch], MicroBatchResult]


def run_forward(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    compute: Callable[[torch.Tensor, PackedBatch], Any],
    groups: ParallelGroups,
) -> list[Any]:
    """`compute(output, batch)` for each micro-batch, without gradients.

    Args:
        chunks: the model chunks of this rank.
        batches: of one length where there are several stages.
        compute: gets the model's output, see `PackedModel.forward`; runs on the last stage.
        groups: of this rank.

    Returns:
        The results in order on the last stage; nothing elsewhere.
    """

    def as_loss(output: torch.Tensor, batch: PackedBatch) -> MicroBatchResult:
        return MicroBatchResult(output.new_zeros(()), compute(output, batch))

    with torch.no_grad():
        padded = _fill_pipeline(batches, groups)
        return _run(chunks, padded, as_loss, forward_only=True)[: len(batches)]


def run_forward_backward(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    loss_function: LossFunction,
    groups: ParallelGroups,
) -> list[Any]:
    """Forward and backward over the micro-batches; gradients add up in the chunks.

    The schedule divides every loss by the number of micro-batches, and gradient reduction divides
    by the data-parallel size; both are undone here, so the gradient is that of the plain sum of
    the losses over all micro-batches and data-parallel ranks. (Context-parallel ranks all have the
    whole loss and the gradient of their own tokens; the schedule multiplies by their number what
    the reduction divides by it.) Auxiliary losses of experts are means over the micro-batches and
    data-parallel ranks, as Megatron has them.
    """
    padded = _fill_pipeline(batches, groups)
    scale = float(len(batches) * groups.data.size())

    def scaled(output: torch.Tensor, batch: PackedBatch) -> MicroBatchResult:
        result = loss_function(output, batch)
        return MicroBatchResult(result.loss * scale, result.kept)

    with _scaled_losses(chunks, len(padded) / len(batches)):
        return _run(chunks, padded, scaled, forward_only=False)[: len(batches)]


@contextmanager
def _scaled_losses(chunks: Sequence[Any], factor: float) -> Iterator[None]:
    """Multiply the main and auxiliary losses, which the schedule divides by fill batches, too."""
    from megatron.core.utils import get_model_config

    config: Any = get_model_config(chunks[0])
    inner = config.grad_scale_func

    def scale(loss: torch.Tensor) -> torch.Tensor:
        return (loss if inner is None else inner(loss)) * factor

    config.grad_scale_func = scale if factor != 1.0 else inner
    try:
        yield
    finally:
        config.grad_scale_func = inner


def _run(
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    loss_function: LossFunction,
    *,
    forward_only: bool,
) -> list[Any]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward_step(iterator: Iterator[PackedBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(iterator)
        output = model(batch)

        def finish(result: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
            found = loss_function(result, batch)
            # The schedule divides the loss it gets in place: hand out what is kept by itself.
            return found.loss, {"kept": found.kept}

        return output, finish

    iterators: Any = [iter(batches) for _ in chunks]
    store = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=batches[0].num_stream_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return [entry["kept"] for entry in store]


def _fill_pipeline(batches: Sequence[PackedBatch], groups: ParallelGroups) -> list[PackedBatch]:
    """Virtual stages need a multiple of the pipeline's length: fill with masked batches."""
    padded = list(batches)
    if groups.layout.vpp_size > 1:
        while len(padded) % groups.layout.pp_size:
            last = padded[-1]
            extras = {key: torch.zeros_like(value) for key, value in last.extras.items()}
            mask = torch.zeros_like(last.mask)
            is_fill = torch.ones_like(last.is_fill)
            padded.append(replace(last, mask=mask, is_fill=is_fill, num_rows=0, extras=extras))
    return padded
