"""The mixture-of-experts dispatcher gives torch.distributed plain split sizes on the CPU, too.

Seen in megatron-core 0.16.1: `maybe_move_tensor_to_cpu` converts to numpy only where the tensor is
on CUDA, so gloo's all-to-all gets tensors as split sizes and refuses them. And without Transformer
Engine `moe_utils` uses `te_general_gemm` without defining it.
"""

from typing import Any

import torch

from megatron_adapters.patches.guard import expect_source

__all__ = ["apply"]


def apply() -> None:
    """Replace the conversion, and define the missing name."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    expect_source(moe_utils.maybe_move_tensor_to_cpu, "tensor.is_cuda", "cpu_moe")
    moe_utils.maybe_move_tensor_to_cpu = _to_host
    token_dispatcher.maybe_move_tensor_to_cpu = _to_host
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    del record_stream
    if not isinstance(tensor, torch.Tensor):
        return tensor
    return tensor.cpu().numpy() if as_numpy else tensor.cpu()
