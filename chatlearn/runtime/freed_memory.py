"""Keeps freed memory in the process, so that the next step does not fault it in anew.

glibc gives every freed block above some size (128 KiB to 32 MiB) back to the kernel. A training or
decoding step frees and takes the same large tensors over and over: each time the kernel clears
their pages again, which on some machines costs more than what is calculated in them. GPUs have
their caching allocator for the same reason.
"""

from __future__ import annotations

import ctypes
import os
import sys

__all__ = ["build_allocator_environment", "keep_freed_memory"]

# From glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 1 << 30
_NEVER = (1 << 31) - 1


def build_allocator_environment() -> dict[str, str]:
    """The variables by which a new process keeps freed memory, in all of its threads.

    One arena serves all threads, since others hold blocks of at most 64 MiB. Blocks above 1 GiB
    still go back to the kernel. Empty where the user has set MALLOC_ variables of his own.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return {}
    return {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(_LARGEST),
        "MALLOC_TRIM_THRESHOLD_": str(_NEVER),
    }


def keep_freed_memory() -> bool:
    """Tell glibc the same for this process, which has begun; serves its main thread.

    Returns:
        Whether it was told: not where the user has set MALLOC_ variables, or the C library is
        another.
    """
    if not sys.platform.startswith("linux") or not build_allocator_environment():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1))
    return all([bool(mallopt(name, value)) for name, value in settings])
