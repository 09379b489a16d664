"""BaseModule: what users subclass, on the driver a description, in a worker the model itself.

The same object is made in the user's program and pickled into every worker of the model, so a
constructor must be light; `setup` builds what is heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from torch.distributed import ProcessGroup

    from chatlearn.config import ModelConfig, RuntimeConfig
    from chatlearn.data.rows import RowId
    from chatlearn.parallel.context import WorkerContext
    from chatlearn.parallel.layout import ParallelLayout
    from chatlearn.parallel.sharding import TensorShard

__all__ = ["BaseModule"]


class BaseModule:
    """One model of a flow."""

    def __init__(self, name: str) -> None:
        self.name = name
