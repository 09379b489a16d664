# pyright: standard, reportPrivateImportUsage=false
"""Lets Megatron-Core run without CUDA: its modules see a `torch` that knows the CPU.

Seen in megatron-core 0.16.1: `torch.cuda.current_device()`, `synchronize()` and others are called
unconditionally, and tensors are made with `device="cuda"`. Only the name `torch` within Megatron's
own modules is replaced; torch itself stays as it is, so `torch.cuda.is_available()` is still False
and no other library notices.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from megatron_adapters.patches.guard import expect_source

__all__ = ["CpuCuda", "CpuStream", "CpuTorch", "apply"]

_FACTORIES = ("zeros", "ones", "empty", "full", "tensor", "arange", "randn", "rand")


class CpuStream:
    """A stream, or an event of one, on a device that is always in step."""

    def record_event(self, _event: Any = None) -> "CpuStream":
        """An event that has happened."""
        return self

    def record(self, _stream: Any = None) -> None:
        """There is nothing to record."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    wait_stream = wait_event = wait = record


class CpuCuda:
    """Stands for `torch.cuda`: there is one device, the CPU, and it is always in step."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> str:
        """The CPU, as a device name."""
        return "cpu"

    def set_device(self, _device: Any) -> None:
        """There is nothing to choose."""

    def synchronize(self, _device: Any = None) -> None:
        """Calls on the CPU are done when they return."""

    def empty_cache(self) -> None:
        """There is no cache."""

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU's generator."""
        torch.manual_seed(seed)

    def get_rng_state(self, _device: Any = None) -> torch.Tensor:
        """State of the CPU's generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, _device: Any = None) -> None:
        """Set the state of the CPU's generator."""
        torch.set_rng_state(state)

    def max_memory_allocated(self, _device: Any = None) -> int:
        """Not counted."""
        return 0

    def memory_allocated(self, _device: Any = None) -> int:
        """Not counted."""
        return 0

    def is_current_stream_capturing(self) -> bool:
        """There are no CUDA graphs."""
        return False

    def stream(self, _stream: Any) -> Any:
        """There are no streams."""
        return nullcontext()

    def current_stream(self, _device: Any = None) -> CpuStream:
        """The only one."""
        return CpuStream()

    default_stream = current_stream

    def Stream(self, *_options: Any, **_named: Any) -> "CpuStream":  # noqa: N802 - torch's name
        """Stands for a stream or an event: everything is done when it is asked for."""
        return CpuStream()

    Event = Stream


class CpuTorch:
    """Stands for `torch` within Megatron's modules."""

    def __init__(self) -> None:
        self.cuda = CpuCuda()
        for name in _FACTORIES:
            self.__dict__[name] = _on_cpu(getattr(torch, name))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def apply() -> None:
    """Replace the name `torch` in every Megatron module that is imported."""
    from megatron.core.optimizer import clip_grads
    from megatron.core.pipeline_parallel import schedules

    source = 'torch.zeros([], dtype=torch.int, device="cuda")'
    expect_source(schedules.forward_backward_no_pipelining, source, "cpu_torch")
    expect_source(clip_grads.get_grad_norm_fp32, "device='cuda'", "cpu_torch")
    replacement = CpuTorch()
    for name, module in list(sys.modules.items()):
        is_megatron = name.startswith("megatron.") and isinstance(module, ModuleType)
        if is_megatron and module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = replacement


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **named: Any) -> Any:
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        # Pinned memory needs CUDA.
        named.pop("pin_memory", None)
        return factory(*args, **named)

    return make
