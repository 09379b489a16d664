"""How a module's public methods record themselves in a flow that is being traced.

The wrappers are put on when a class is defined; outside a trace they only call the method.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn, cast

from chatlearn.errors import FlowError
from chatlearn.models.flow_value import FlowRecorder, FlowValue, current_recorder, find_flow_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chatlearn.models.base import BaseModule

__all__ = ["HOOKS", "STEPS", "trace_methods"]

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
        "complete_config",
        "find_problems",
        "planned_weight_shards",
        "has_own_description",
        "weight_shards",
        "weight_shards_in",
        "weight_tensors",
        "before_weight_sync",
        "after_weight_sync",
        "load_checkpoint",
        "prepare_episode",
        "wants_whole_episode",
        "is_last_rank",
        "log_metrics",
    }
)


def trace_methods(cls: type, missing: frozenset[str] = frozenset()) -> None:
    """Let the public methods of `cls` record themselves, those of its mixins included.

    Methods that `cls` defines are wrapped in place. One that it inherits from a class that is
    no module gets a forwarder on `cls`, which looks the method up by the usual resolution
    order, so that overriding and `super()` mean what they always do. Static methods, class
    methods, properties and private names are left alone.

    Args:
        cls: the class, complete.
        missing: methods of `cls` that only say that a subclass should define them.
    """
    for name in dict.fromkeys(name for owner in cls.__mro__[:-1] for name in vars(owner)):
        owner, member = _find_method(cls, name)
        if name.startswith("_") or not isinstance(member, FunctionType):
            continue
        if not _is_wrapper(member, "_traces"):
            forwarding_class = None if owner is cls else cls
            method = _Method(member, name, forwarding_class, owner is cls and name in missing)
            setattr(cls, name, _wrap(method))


def _find_method(cls: type, name: str) -> tuple[type | None, object]:
    """Where the resolution order finds `name`, forwarders left out."""
    for owner in cls.__mro__[:-1]:
        if name in vars(owner) and not _is_wrapper(vars(owner)[name], "_forwards"):
            return owner, vars(owner)[name]
    return None, None


def _is_wrapper(member: object, mark: str) -> bool:
    # A user's decorator may copy a wrapper's __dict__ to its own: only the wrapper itself counts.
    return isinstance(member, FunctionType) and vars(member).get(mark) is member


@dataclass(frozen=True)
class _Method:
    """A public method, and how a trace treats its calls.

    Attributes:
        function: what the user wrote.
        name: the name it is called by.
        forwarding_class: where the forwarder of an inherited method lies; None: no forwarder.
        is_missing: the method only says that a subclass should define it.
    """

    function: FunctionType
    name: str
    forwarding_class: type | None
    is_missing: bool

    def call(self, module: BaseModule, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """The plain call."""
        if self.forwarding_class is None:
            return self.function(module, *args, **named)
        owner = cast("Any", super(self.forwarding_class, module))
        return getattr(owner, self.name)(*args, **named)

    def record(
        self,
        recorder: FlowRecorder,
        module: BaseModule,
        args: tuple[Any, ...],
        named: Mapping[str, Any],
    ) -> Any:
        """The call as a flow makes it: recorded if it takes a batch, plain if it does not."""
        given = (*args, *named.values())
        inputs = [value for value in given if isinstance(value, FlowValue)]
        if any(_hides_batch(value) for value in given):
            self._refuse(module, "takes batches one by one, not inside a list or dict")
        if not inputs and self.name not in STEPS:
            return self.call(module, args, named)
        if not inputs:
            self._refuse(module, "is called without a batch: pass the flow's argument or an output")
        plain = [value for value in args if not isinstance(value, FlowValue)]
        if plain:
            self._refuse(module, f"takes {plain[0]!r} beside a batch: pass it by keyword")
        constants = {key: each for key, each in named.items() if not isinstance(each, FlowValue)}
        self._check_method(module, constants)
        return recorder.record(module, self.name, inputs, constants)

    def _check_method(self, module: BaseModule, constants: Mapping[str, Any]) -> None:
        if not {"name", "policy_version"} <= vars(module).keys():
            self._refuse(module, "is not set up: call super().__init__(name) in its constructor")
        if self.name in HOOKS:
            self._refuse(module, "is called by the framework and cannot be part of a flow")
        if self.is_missing:
            self._refuse(module, "is not there: define the method in the module's class")
        kinds = (inspect.isgeneratorfunction, inspect.iscoroutinefunction)
        if any(is_kind(self.function) for is_kind in (*kinds, inspect.isasyncgenfunction)):
            self._refuse(module, "is async or a generator: write a plain method that returns rows")
        signature = inspect.signature(self.function)
        options = {"iteration": 0} if "iteration" in signature.parameters else {}
        try:
            signature.bind(module, {}, **{**options, **constants})
        except TypeError as error:
            self._refuse(
                module,
                f"cannot be called as method(data, **options) with its signature {signature}: "
                f"{error}. All inputs of a call arrive merged into one dict, `data`",
            )

    def _refuse(self, module: BaseModule, what: str) -> NoReturn:
        name = getattr(module, "name", type(module).__name__)
        raise FlowError(f"{find_flow_line()}\n{name}.{self.name} {what}")


def _wrap(method: _Method) -> Callable[..., Any]:
    @functools.wraps(method.function)
    def traced(self: BaseModule, *args: Any, **named: Any) -> Any:
        recorder = current_recorder()
        if recorder is None:
            return method.call(self, args, named)
        return method.record(recorder, self, args, named)

    vars(traced)["_traces"] = traced
    if method.forwarding_class is not None:
        vars(traced)["_forwards"] = traced
    return traced


def _hides_batch(value: object) -> bool:
    """Whether a batch lies somewhere inside a container."""
    if isinstance(value, Mapping):
        entries = tuple(cast("Mapping[Any, Any]", value).values())
    elif isinstance(value, list | tuple | set | frozenset):
        entries = tuple(cast("Iterable[Any]", value))
    else:
        return False
    return any(isinstance(entry, FlowValue) or _hides_batch(entry) for entry in entries)
