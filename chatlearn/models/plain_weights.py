"""Weights of a plain torch model: described, reached and saved by its `state_dict` names."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from chatlearn.checkpoint.plain_values import load_plain, to_plain
from chatlearn.errors import ChatLearnError, CheckpointError, explain_unwritten, in_one_line

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch

    from chatlearn.parallel.layout import ParallelLayout
    from chatlearn.parallel.sharding import TensorShard

__all__ = [
    "HUGGINGFACE",
    "describe_huggingface",
    "describe_state_dict",
    "load_state",
    "read_state",
    "state_file_name",
    "state_tensors",
    "write_state",
]

# The naming of weights that live `transformers` models have in common.
HUGGINGFACE = "huggingface"


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


def describe_huggingface(name: str, model: Any) -> tuple[TensorShard, ...]:
    """As `describe_state_dict`, for a `transformers` model: tied weights are described once.

    The name that counts is the one that the model ties others to (`model.embed_tokens.weight`).
    """
    tensors = state_tensors(name, model)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    aliases = {
        alias
        for alias, origin in tied.items()
        if alias in tensors
        and origin in tensors
        and tensors[alias].data_ptr() == tensors[origin].data_ptr()
    }
    shards = describe_state_dict(name, model)
    return tuple(shard for shard in shards if shard.key not in aliases)


def state_file_name(layout: ParallelLayout, rank: int) -> str:
    """The file of one rank: one for the model, or one for each part that it is cut into."""
    if layout.world_size == layout.dp_size:
        return "model.pt"
    at = layout.coordinates(rank)
    return f"model.tp{at.tp_rank}.cp{at.cp_rank}.pp{at.pp_rank}.pt"


def read_state(model: Any, optimizer: Any, iteration: int, scheduler: Any = None) -> dict[str, Any]:
    """State of model, optimizer and schedule, as `write_state` takes it; tensors are the live ones.

    Raises:
        CheckpointError: the schedule's state holds something that could not be loaded again.
    """
    state = {"model": dict(model.state_dict()), "iteration": iteration}
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    if _is_schedule(scheduler):
        state["scheduler"] = to_plain(scheduler.state_dict(), "self.scheduler.state_dict()")
    return state


def write_state(path: Path, state: Mapping[str, Any]) -> Path:
    """Write what `read_state` gave to `path`, which it gives; the file appears whole or not at all.

    Raises:
        CheckpointError: the file cannot be written.
    """
    import torch

    draft = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, draft)
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(explain_unwritten(path, error)) from error
    finally:
        # What the folder itself raises here must not hide the error above.
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    return path


def load_state(
    path: Path, model: Any, optimizer: Any, device: torch.device, scheduler: Any = None
) -> None:
    """Read what `write_state` wrote, without running code from the file.

    Raises:
        CheckpointError: the file is missing, damaged, or does not fit the model.
    """
    if model is None:
        raise CheckpointError(f"{path} cannot be loaded: build self.model in setup() first")
    state = load_plain(path, device)
    try:
        model.load_state_dict(state["model"])
        if optimizer is not None and "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        if _is_schedule(scheduler) and "scheduler" in state:
            scheduler.load_state_dict(state["scheduler"])
    except Exception as error:  # modules and optimizers raise anything
        raise CheckpointError(f"{path} cannot be loaded: {in_one_line(error)}") from error


def _is_schedule(value: Any) -> bool:
    """Whether a module's `scheduler` is something with a state."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")
