# pyright: standard, reportPrivateImportUsage=false
"""Functions of Megatron that ask a tensor for its CUDA type, or move it to CUDA, on the CPU.

Seen in megatron-core 0.16.1: gradient clipping and the mixed-precision optimizers compare
`tensor.type()` with `torch.cuda.FloatTensor` and its like; tied embeddings and the distributed
optimizer's checkpoint call `tensor.cuda()`. Within these functions, and only there, a CPU tensor
gives the CUDA type's name and `cuda()` gives the tensor itself.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_adapters.patches.guard import expect_source

__all__ = ["apply"]


def apply() -> None:
    """Wrap the functions concerned."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    patch = "cpu_tensor_kind"
    expect_source(clip_grads.clip_grad_by_total_norm_fp32, "'torch.cuda.FloatTensor'", patch)
    wrapped = _as_cuda(clip_grads.clip_grad_by_total_norm_fp32)
    clip_grads.clip_grad_by_total_norm_fp32 = wrapped
    optimizer.clip_grad_by_total_norm_fp32 = wrapped

    mixed = optimizer.Float16OptimizerWithFloat16Params
    expect_source(mixed.__init__, "'torch.cuda.FloatTensor'", patch)
    mixed.__init__ = _as_cuda(mixed.__init__)

    sharded: Any = distrib_optimizer.DistributedOptimizer
    build = sharded._build_model_and_main_param_groups
    expect_source(build, "'torch.cuda.FloatTensor'", patch)
    sharded._build_model_and_main_param_groups = classmethod(_as_cuda(build.__func__))
    gather = sharded.get_parameter_state_dp_zero
    expect_source(gather, "send_tensor.cuda()", patch)
    sharded.get_parameter_state_dp_zero = _as_cuda(gather)

    tie = LanguageModule.setup_embeddings_and_output_layer
    expect_source(tie, "weight.data.cuda()", patch)
    LanguageModule.setup_embeddings_and_output_layer = _as_cuda(tie)


def _as_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **named: Any) -> Any:
        with _cuda_kinds():
            return function(*args, **named)

    return wrapped


@contextmanager
def _cuda_kinds() -> Iterator[None]:
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def tensor_type(tensor: torch.Tensor, *args: Any, **named: Any) -> Any:
        found = real_type(tensor, *args, **named)
        if isinstance(found, str) and not found.startswith("torch.cuda."):
            return found.replace("torch.", "torch.cuda.", 1)
        return found

    def tensor_cuda(tensor: torch.Tensor, *_args: Any, **_named: Any) -> torch.Tensor:
        return tensor

    torch.Tensor.type, torch.Tensor.cuda = tensor_type, tensor_cuda  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.Tensor.type, torch.Tensor.cuda = real_type, real_cuda  # type: ignore[method-assign]
