"""An engine made of a config alone, for the command line."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from chatlearn.engine.builtin import (
    DPOEngine,
    EvalEngine,
    GRPOEngine,
    OnlineDPOEngine,
    RLHFEngine,
)
from chatlearn.engine.engine import Engine
from chatlearn.errors import ConfigError
from chatlearn.models.base import BaseModule
from chatlearn.models.dotted_path import load_object

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chatlearn.config import Config

__all__ = ["build_engine"]

_BUILT_IN: Mapping[str, Callable[..., Engine]] = {
    "rlhf": RLHFEngine,
    "grpo": GRPOEngine,
    "dpo": DPOEngine,
    "online_dpo": OnlineDPOEngine,
    "eval": EvalEngine.over_models,
}


def build_engine(config: Config) -> Engine:
    """The engine that `runtime.engine` names, over the modules that `models` names.

    A built-in engine takes the models of its constructor's parameter names; a dotted path
    `package.module:build` is called with the config and returns an Engine.

    Raises:
        ConfigError: no engine named, a model missing or not needed, or a wrong type built.
    """
    name = config.runtime.engine
    if name is None:
        known = ", ".join(_BUILT_IN)
        raise ConfigError(f"runtime.engine is missing: name one of {known} or package.module:build")
    if name in _BUILT_IN:
        return _build_built_in(name, config)
    build = load_object(name, "runtime.engine")
    is_class = isinstance(build, type)
    is_known = issubclass(build, Engine) if is_class else not inspect.isbuiltin(build)
    if not callable(build) or not is_known:
        raise ConfigError(
            f"runtime.engine: {name} is a {type(build).__name__}; expected a function of the "
            "config that gives a chatlearn.Engine"
        )
    engine = build(config)
    if not isinstance(engine, Engine):
        raise ConfigError(
            f"runtime.engine: {name} gave {type(engine).__name__}; expected a chatlearn.Engine"
        )
    return engine


def build_module(config: Config, name: str) -> BaseModule:
    """The module object of one model, by `models.<name>.module`.

    Raises:
        ConfigError: the key is missing or does not name a BaseModule subclass.
    """
    path = config.model(name).module
    if path is None:
        raise ConfigError(
            f"models.{name}.module is missing: name its class, such as "
            "megatron_adapters:PolicyInference"
        )
    kind = load_object(path, f"models.{name}.module")
    if not isinstance(kind, type) or not issubclass(kind, BaseModule):
        raise ConfigError(f"models.{name}.module: {path} is not a subclass of BaseModule")
    return kind(name)


def _build_built_in(name: str, config: Config) -> Engine:
    build = _BUILT_IN[name]
    if name == "eval":
        return build({model: build_module(config, model) for model in config.models})
    needed = [p for p in inspect.signature(build).parameters if p != "self"]
    missing = [model for model in needed if model not in config.models]
    if missing:
        raise ConfigError(
            f"runtime.engine: {name} needs the models {', '.join(needed)}; "
            f"models.{missing[0]} is missing"
        )
    extra = [model for model in config.models if model not in needed]
    if extra:
        raise ConfigError(
            f"runtime.engine: {name} takes the models {', '.join(needed)}; "
            f"models.{extra[0]} is not one of them"
        )
    return build(**{model: build_module(config, model) for model in needed})
