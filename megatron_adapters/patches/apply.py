# pyright: standard, reportPrivateImportUsage=false
"""Imports Megatron-Core quietly and applies the patches that this machine needs, once."""

import importlib
import logging
import warnings
from types import ModuleType
from typing import Any

import torch

from chatlearn.errors import ChatLearnError

__all__ = ["apply_patches", "import_megatron"]

_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.dist_checkpointing",
)
_MARK = "_chatlearn_patched"


def import_megatron() -> ModuleType:
    """`megatron.core` with everything that the adapters use.

    Without CUDA its decorators must not build compilers: `torch.compile` is the identity while
    Megatron is imported, which saves seconds and memory of every worker.
    """
    real_compile = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _leave_plain  # type: ignore[assignment]
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in _MODULES:
                importlib.import_module(name)
            core = importlib.import_module("megatron.core")
    finally:
        torch.compile = real_compile
    return core


def apply_patches(device: torch.device) -> None:
    """Apply every patch that `device` needs; a second call does nothing.

    Raises:
        ChatLearnError: Megatron-Core is of another version line, or a patched place has changed.
    """
    core = import_megatron()
    version: str = core.__version__
    if not version.startswith("0.16."):
        raise ChatLearnError(
            f"megatron-core {version} is installed; the adapters are written for 0.16: "
            "pip install 'megatron-core>=0.16.1,<0.17'"
        )
    if getattr(core, _MARK, False):
        return
    from megatron_adapters.patches import (
        adam_state,
        cpu_moe,
        cpu_random,
        cpu_tensor_kind,
        cpu_torch,
        latent_attention,
        moe_padding,
    )

    core.__dict__[_MARK] = True
    adam_state.apply()
    latent_attention.apply()
    moe_padding.apply()
    if device.type != "cpu":
        return
    cpu_tensor_kind.apply()
    cpu_random.apply()
    cpu_moe.apply()
    cpu_torch.apply()


def _leave_plain(function: Any = None, **_options: Any) -> Any:
    return function if function is not None else _leave_plain
