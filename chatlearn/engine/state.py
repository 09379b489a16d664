"""The configuration that `chatlearn.init` chose for this process.

The one place besides the flow recorder that keeps state at module level: a notebook runs each
cell in a context of its own, so a context variable would be forgotten between cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatlearn.config import Config

__all__ = ["current_config", "init"]


class _ProcessState:
    """Holds the configuration of this process."""

    config: Config | None = None


_STATE = _ProcessState()


def init(
    config: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Choose the configuration of the runs that follow in this process; optional.

    Under torchrun it also builds the Ray cluster, so call it before anything else: every process
    that torchrun started stays in here, runs Ray for its node, and exits with the driver's exit
    code. The driver is the same command, which global rank 0 starts once more with the cluster
    in `RAY_ADDRESS`.

    Args:
        config: a YAML file, or its content as a mapping; None: `$CHATLEARN_CONFIG`, else the
            defaults.
        overrides: `key.path=value` entries that win over the file.

    Returns:
        The resolved configuration.

    Raises:
        ConfigError: the configuration cannot work.
    """
    from chatlearn.config import load_config
    from chatlearn.runtime.launch import join_torchrun_cluster

    resolved = load_config(config, overrides)
    _STATE.config = resolved
    join_torchrun_cluster(resolved)
    return resolved


def current_config() -> Config:
    """The configuration of `init`, else that of `$CHATLEARN_CONFIG`, else the defaults."""
    from chatlearn.config import load_config

    if _STATE.config is None:
        return load_config()
    return _STATE.config
