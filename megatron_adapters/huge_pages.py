"""Large pages for memory that is read with strides: virtual machines walk pages slowly."""

import ctypes
import mmap
import sys

import torch

__all__ = ["ask_for_huge_pages"]

_SIZE = 1 << 21


def ask_for_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask Linux to hold a new tensor's memory in pages of 2 MiB; call it before the first write.

    What the allocator puts there later has such pages, too.

    Args:
        tensor: on the CPU, contiguous.

    Returns:
        Whether the kernel was asked and did not refuse; it need not have any.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    first = -(-tensor.data_ptr() // _SIZE) * _SIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // _SIZE * _SIZE
    if not sys.platform.startswith("linux") or advice is None or first >= stop:
        return False
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    address, length = ctypes.c_void_p(first), ctypes.c_size_t(stop - first)
    return madvise(address, length, ctypes.c_int(advice)) == 0
