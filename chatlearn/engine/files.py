"""Files that a config names, and which of them are not there. Driver side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatlearn.config import Config
    from chatlearn.config.schema import DataSource
    from chatlearn.models.base import BaseModule

__all__ = ["find_missing_data", "find_missing_files"]


def find_missing_files(config: Config, modules: Mapping[str, BaseModule]) -> tuple[str, ...]:
    """What the workers will look for and not find: tokenizer and checkpoints; a line each.

    Args:
        config: the configuration.
        modules: the models that the flows call, by name.
    """
    named = [
        ("runtime.tokenizer", config.runtime.tokenizer),
        ("runtime.chat_template", config.runtime.chat_template),
    ]
    named += [
        (f"models.{name}.load", config.model(name).load)
        for name, module in modules.items()
        if _loads_from_disk(module)
    ]
    # Workers run in `runtime_env.working_dir` where there is one.
    folders = ("", config.runtime_env.working_dir or "")
    return tuple(
        f"{key}: {path} is not there"
        for key, path in named
        if path is not None and not any(os.path.exists(Path(folder, path)) for folder in folders)
    )


def find_missing_data(key: str, sources: Sequence[str | DataSource] | None) -> tuple[str, ...]:
    """Which prompt files are not there; a line each, with the config's key."""
    paths = [source if isinstance(source, str) else source.path for source in sources or ()]
    return tuple(f"{key}: {path} is not there" for path in paths if not os.path.exists(path))


def _loads_from_disk(module: BaseModule) -> bool:
    """A user's own `load_checkpoint` may take a name that is no path."""
    method = type(module).load_checkpoint
    return method.__module__.partition(".")[0] in ("chatlearn", "megatron_adapters")
