# pyright: standard, reportPrivateImportUsage=false
"""One optimizer step on one global batch, the same for every layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_adapters.model_config import MegatronSettings
from megatron_adapters.packing import PackedBatch
from megatron_adapters.parallel_state import ParallelGroups
from megatron_adapters.patches.adam_state import fuse_updates, inner_optimizers
from megatron_adapters.pipeline import MicroBatchResult, run_forward_backward

__all__ = [
    "StepResult",
    "TrainingState",
    "build_training_state",
    "has_finite_weights",
    "reduce_over_data",
    "train_batch",
]

_FOREVER = 1 << 40


@dataclass(frozen=True)
class TrainingState:
    """What training needs besides the weights.

    Attributes:
        chunks: model chunks, wrapped for gradient reduction.
        optimizer: Megatron's optimizer.
        scheduler: Megatron's learning rate schedule.
        groups: of this rank.
        name: the model, for messages.
    """

    chunks: Sequence[Any]
    optimizer: Any
    scheduler: Any
    groups: ParallelGroups
    name: str


@dataclass(frozen=True)
class StepResult:
    """What one step did; equal on every rank.

    Attributes:
        sums: what the loss function kept, added over micro-batches and data-parallel ranks.
        grad_norm: before clipping.
        learning_rate: of this step.
        is_skipped: the update was left out.
    """

    sums: torch.Tensor
    grad_norm: float
    learning_rate: float
    is_skipped: bool = False


def build_training_state(
    name: str, chunks: Sequence[Any], settings: MegatronSettings, groups: ParallelGroups
) -> TrainingState:
    """Optimizer and schedule over the chunks."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import get_megatron_optimizer

    optimizer = get_megatron_optimizer(settings.optimizer, list(chunks))
    for inner in inner_optimizers(optimizer):
        fuse_updates(inner)
    config = settings.transformer
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if settings.ddp.overlap_grad_reduce:
        # Gradients are reduced in the last micro-batch's backward pass, not in each.
        no_syncs = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
    scheduler = _build_scheduler(optimizer, settings)
    return TrainingState(chunks, optimizer, scheduler, groups, name)


def train_batch(
    state: TrainingState,
    batches: Sequence[PackedBatch],
    loss_function: Callable[[torch.Tensor, PackedBatch], MicroBatchResult],
    num_sums: int,
    check: Callable[[torch.Tensor, float], bool],
) -> StepResult:
    """Forward, backward, clip, update.

    Args:
        state: of the model.
        batches: this rank's micro-batches.
        loss_function: gives a micro-batch's share of the global loss, and in `kept` a [num_sums]
            tensor whose first entry is that share.
        num_sums: length of `kept`.
        check: gets the sums and the gradient's norm, equal on every rank, before the update; False:
            leave it out. May raise.
    """
    for chunk in state.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    learning_rate = float(state.optimizer.param_groups[0]["lr"])
    biases = _selection_biases(state.chunks)
    before = [bias.clone() for bias in biases]
    kept = run_forward_backward(state.chunks, batches, loss_function, state.groups)
    sums = _collect(kept, num_sums, state.groups)
    norm = _prepare_gradients(state.optimizer)
    # The backward pass has moved them already, which is a part of the update.
    after = [bias.clone() for bias in biases]
    _put_back(biases, before)
    if not check(sums, norm):
        # As if the batch had not been there: weights, moments and schedule stay.
        return StepResult(sums, norm, learning_rate, is_skipped=True)
    _put_back(biases, after)
    _clip_gradients(state.optimizer, norm)
    state.optimizer.step_with_ready_grads()
    state.scheduler.step(increment=1)
    return StepResult(sums, norm, learning_rate)


def _selection_biases(chunks: Sequence[Any]) -> list[torch.Tensor]:
    """What experts' routers add to scores for an even load; no parameter, but trained."""
    modules = [module for chunk in chunks for module in chunk.modules()]
    found = [getattr(module, "expert_bias", None) for module in modules]
    return [bias for bias in found if isinstance(bias, torch.Tensor)]


def _put_back(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _prepare_gradients(optimizer: Any) -> float:
    """The gradient's norm over the whole model; infinite where the loss scaler found it so.

    This and what follows are the parts of the optimizer's `step` (megatron-core 0.16.1), so that
    the norm can be looked at before the weights change.
    """
    if optimizer.prepare_grads():
        return float("inf")
    return float(optimizer.get_grad_norm())


def _clip_gradients(optimizer: Any, norm: float) -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
        if parameters and part.config.clip_grad > 0.0:
            clip_grad_by_total_norm_fp32(
                parameters,
                part.config.clip_grad,
                norm,
                part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )


def has_finite_weights(state: TrainingState) -> bool:
    """Whether this rank's weights are all finite, to the precision of a sum."""
    sums = [
        parameter.detach().sum(dtype=torch.float32)
        for chunk in state.chunks
        for parameter in chunk.parameters()
        if parameter.requires_grad
    ]
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())


def reduce_over_data(sums: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Add a tensor over the data-parallel ranks, in float64."""
    total = sums.double()
    if groups.data.size() > 1:
        dist.all_reduce(total, group=groups.data)
    return total


def _collect(kept: Sequence[torch.Tensor], num_sums: int, groups: ParallelGroups) -> torch.Tensor:
    """Add what the last stage kept over micro-batches and ranks, and tell every stage."""
    if kept:
        total = torch.stack([entry.double() for entry in kept]).sum(0)
    else:
        total = torch.zeros(num_sums, dtype=torch.float64)
        if torch.cuda.is_available():
            total = total.cuda()
    total = reduce_over_data(total, groups)
    if groups.pipeline.size() > 1:
        last = dist.get_process_group_ranks(groups.pipeline)[-1]
        dist.broadcast(total, src=last, group=groups.pipeline)
    return total.cpu()


def _build_scheduler(optimizer: Any, settings: MegatronSettings) -> Any:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    config, fields = settings.optimizer, settings.schedule
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr or 0.0,
        lr_warmup_steps=fields["lr_warmup_steps"],
        lr_decay_steps=fields["lr_decay_steps"] or _FOREVER,
        lr_decay_style=fields["lr_decay_style"],
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=fields["lr_wsd_decay_steps"],
        lr_wsd_decay_style=fields["lr_wsd_decay_style"],
    )
