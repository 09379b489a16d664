"""What the models of the flows add to a configuration. Driver side, before any worker starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.config.checks import find_contradictions
from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chatlearn.config import Config
    from chatlearn.models.base import BaseModule

__all__ = ["CompletedRun", "complete_config"]


@dataclass(frozen=True)
class CompletedRun:
    """A configuration with what the models added.

    Attributes:
        config: the configuration.
        notes: a line for each thing that a model wants its user to know.
    """

    config: Config
    notes: tuple[str, ...]


def complete_config(config: Config, modules: Mapping[str, BaseModule]) -> CompletedRun:
    """Let every module complete its section; check again where one did.

    A tokenizer that belongs to a model becomes `runtime.tokenizer` where the user names none.

    Args:
        config: as it was read.
        modules: the models that the flows call, by name.

    Raises:
        ConfigError: a module cannot, the whole contradicts itself, or two models bring different
            tokenizers.
    """
    models, notes, tokenizers = dict(config.models), list[str](), dict[str, str]()
    for name, module in modules.items():
        before = config.model(name)
        try:
            completed = module.complete_config(before)
        except ConfigError as error:
            raise ConfigError(f"models.{name}: {error}") from error
        notes += [f"models.{name}: {note}" for note in completed.notes]
        if completed.config is not before:
            models[name] = completed.config
        if completed.tokenizer is not None:
            tokenizers.setdefault(completed.tokenizer, name)
    found = config.model_copy(update={"models": models})
    if found.runtime.tokenizer is None and tokenizers:
        tokenizer = _choose(tokenizers)
        notes.append(f"runtime.tokenizer: {tokenizer}")
        runtime = found.runtime.model_copy(update={"tokenizer": tokenizer})
        found = found.model_copy(update={"runtime": runtime})
    if models != dict(config.models):
        problems = find_contradictions(found)
        if problems:
            raise ConfigError("\n  ".join(["the models cannot be built:", *problems]))
    return CompletedRun(found, tuple(notes))


def _choose(tokenizers: Mapping[str, str]) -> str:
    if len(tokenizers) > 1:
        found = ", ".join(f"{path} (models.{name})" for path, name in tokenizers.items())
        raise ConfigError(
            f"the models bring different tokenizers: {found}; set runtime.tokenizer to the one "
            "that all of them understand"
        )
    return next(iter(tokenizers))
