"""The precision of a model whose config leaves it open."""

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["has_native_bf16", "with_precision"]


def has_native_bf16(device_type: str) -> bool:
    """Whether a device multiplies matrices of bfloat16 itself.

    A processor without such instructions is 50 times slower in bfloat16 than in float32. GPUs that
    this process cannot see are taken for recent ones.
    """
    if device_type == "cpu":
        cpu: Any = torch.cpu
        return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())  # noqa: SLF001
    return not torch.cuda.is_available() or torch.cuda.is_bf16_supported()


def with_precision(fields: Mapping[str, Any], device_type: str) -> dict[str, Any]:
    """A model's flat fields with its precision decided.

    Where neither `bf16` nor `fp16` is given, the model is bfloat16, with master weights in float32
    where it is trained, if the device has native bfloat16, and float32 elsewhere.

    Args:
        fields: as the config gives them.
        device_type: `cpu` or `cuda`.
    """
    if fields.get("bf16") is not None or fields.get("fp16") is not None:
        return dict(fields)
    return {**fields, "bf16": has_native_bf16(device_type)}
