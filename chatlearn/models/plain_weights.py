"""Weights of a plain torch model: described, reached and saved by its `state_dict` names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.errors import ChatLearnError, CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from chatlearn.parallel.sharding import TensorShard

__all__ = ["describe_state_dict", "load_state", "save_state", "state_tensors"]

_FILE = "model.pt"


def state_tensors(name: str, model: Any) -> Mapping[str, torch.Tensor]:
    """The live tensors of `model.state_dict()`, detached: writing to them changes the model."""
    import torch

    if model is None or not hasattr(model, "state_dict"):
        raise ChatLearnError(
            f"model {name!r} takes part in a parameter sync, but self.model is "
            f"{type(model).__name__}: build a torch module in setup(), or override weight_shards "
            "and weight_tensors"
        )
    state = model.state_dict()
    return {key: value.detach() for key, value in state.items() if isinstance(value, torch.Tensor)}


def describe_state_dict(name: str, model: Any) -> tuple[TensorShard, ...]:
    """Every tensor of the state dict as a whole: this rank holds all of it."""
    from chatlearn.parallel.sharding import Box, TensorShard

    return tuple(
        TensorShard(
            key=key,
            global_shape=tuple(tensor.shape),
            box=Box((0,) * tensor.dim(), tuple(tensor.shape)),
            dtype=str(tensor.dtype).removeprefix("torch."),
            local_name=key,
            local_offset=(0,) * tensor.dim(),
        )
        for key, tensor in state_tensors(name, model).items()
    )


def save_state(folder: Path, model: Any, optimizer: Any, iteration: int) -> None:
    """Write model and optimizer into `folder`; the file appears whole or not at all."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "iteration": iteration}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    draft = folder / f".{_FILE}.partial"
    torch.save(state, draft)
    os.replace(draft, folder / _FILE)


def load_state(folder: str, model: Any, optimizer: Any, device: torch.device) -> None:
    """Read what `save_state` wrote, without running code from the file.

    Raises:
        CheckpointError: the file is missing or does not fit the model.
    """
    import torch

    path = Path(folder) / _FILE
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        if optimizer is not None and "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from error
