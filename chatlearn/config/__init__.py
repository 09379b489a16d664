"""The typed configuration: YAML in, frozen records out; imports neither torch nor ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatlearn.config.loading import dump_config, load_config
    from chatlearn.config.schema import (
        AlgorithmConfig,
        Config,
        GenerationConfig,
        ModelConfig,
        RuntimeConfig,
        RuntimeEnvConfig,
    )

__all__ = [
    "AlgorithmConfig",
    "Config",
    "GenerationConfig",
    "ModelConfig",
    "RuntimeConfig",
    "RuntimeEnvConfig",
    "dump_config",
    "load_config",
]


def __getattr__(name: str) -> Any:
    # pydantic and yaml load when a config is first needed, so that the package imports quickly.
    if name in ("load_config", "dump_config"):
        from chatlearn.config import loading

        return getattr(loading, name)
    if name in __all__:
        from chatlearn.config import schema

        return getattr(schema, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
