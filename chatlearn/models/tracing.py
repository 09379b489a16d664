"""How a module's public methods record themselves in a flow that is being traced.

The wrapper is put on when a subclass is defined; outside a trace it only calls the method.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import FunctionType
from typing import TYPE_CHECKING, Any

from chatlearn.errors import FlowError
from chatlearn.models.flow_value import FlowRecorder, FlowValue, current_recorder, find_flow_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatlearn.models.base import BaseModule

__all__ = ["HOOKS", "STEPS", "wrap_public_methods"]

STEPS = frozenset({"forward_step", "train_step", "eval_step"})
HOOKS = frozenset(
    {
        "setup",
        "build_dataset",
        "save_checkpoint",
        "before_episode",
        "after_episode",
        "attach",
        "initialize",
        "take_metrics",
        "weight_shards",
        "weight_tensors",
        "after_weight_sync",
        "load_checkpoint",
        "prepare_episode",
        "is_last_rank",
        "log_metrics",
    }
)


def wrap_public_methods(cls: type, base: type) -> None:
    """Wrap every public method that `cls` defines, inherits or mixes in, once.

    Args:
        cls: the new subclass.
        base: BaseModule, whose own methods serve classes that do not override them.
    """
    for owner in reversed(cls.__mro__):
        if owner is object:
            continue
        for name, member in list(vars(owner).items()):
            if name.startswith("_") or not isinstance(member, FunctionType):
                continue
            visible = getattr(cls, name, None)
            if visible is not member or getattr(member, "_is_traced", False):
                continue
            setattr(cls, name, _wrap(member, name))


def _wrap(method: FunctionType, name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def traced(self: BaseModule, *args: Any, **named: Any) -> Any:
        recorder = current_recorder()
        if recorder is None:
            return method(self, *args, **named)
        return _record(recorder, method, self, name, args, named)

    traced._is_traced = True  # type: ignore[attr-defined]
    return traced


def _record(
    recorder: FlowRecorder,
    method: FunctionType,
    module: BaseModule,
    name: str,
    args: tuple[Any, ...],
    named: Mapping[str, Any],
) -> Any:
    values = [value for value in (*args, *named.values()) if isinstance(value, FlowValue)]
    call = f"{module.name}.{name}"
    if any(_hides_flow_value(value) for value in (*args, *named.values())):
        _refuse(call, "takes flow values one by one, not in a list or dict: pass each by itself")
    if not values:
        if name in STEPS:
            _refuse(call, "is called without a batch: pass the flow's argument or an output")
        return method(module, *args, **named)
    if name in HOOKS:
        _refuse(call, "is called by the framework and cannot be part of a flow")
    plain = [value for value in args if not isinstance(value, FlowValue)]
    if plain:
        _refuse(call, f"takes {plain[0]!r} beside a batch: pass plain values by keyword")
    constants = {key: value for key, value in named.items() if not isinstance(value, FlowValue)}
    inputs = [value for value in (*args, *named.values()) if isinstance(value, FlowValue)]
    return recorder.record(module, name, inputs, constants)


def _hides_flow_value(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(entry, FlowValue) for entry in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return any(isinstance(entry, FlowValue) for entry in value)
    return False


def _refuse(call: str, what: str) -> None:
    raise FlowError(f"{find_flow_line()}\n{call} {what}")
