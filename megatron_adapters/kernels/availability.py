"""Whether tensors can go through Triton's kernels."""

import importlib.util
import os
import shutil
from functools import cache

import torch

__all__ = ["can_run_kernels"]


def can_run_kernels(tensor: torch.Tensor) -> bool:
    """Whether a kernel may take this tensor: it is on a GPU, and Triton is there.

    With `TRITON_INTERPRET=1` Triton runs kernels on the CPU, operation by operation: for tests.
    """
    return (tensor.is_cuda or _is_interpreted()) and _has_triton()


@cache
def _has_triton() -> bool:
    """Whether Triton is there, and the C compiler with which it makes what launches a kernel."""
    has_compiler = bool(os.environ.get("CC")) or any(map(shutil.which, ("cc", "gcc", "clang")))
    return importlib.util.find_spec("triton") is not None and has_compiler


@cache
def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
