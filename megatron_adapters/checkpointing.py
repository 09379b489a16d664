# pyright: standard, reportPrivateImportUsage=false
"""Saves and loads models in Megatron's distributed format, which loads at another layout."""

import os
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from chatlearn.errors import CheckpointError
from megatron_adapters.checkpoint_reader import describe_damage, read_checkpoint
from megatron_adapters.checkpoint_writer import RankSave, StagingArea, plan_save
from megatron_adapters.model_building import unwrap
from megatron_adapters.patches.adam_state import (
    allocate_state,
    fuse_updates,
    inner_optimizers,
    separate_steps,
)
from megatron_adapters.saved_metadata import check_metadata, read_metadata
from megatron_adapters.training import TrainingState

__all__ = [
    "build_strategy",
    "has_adapters",
    "has_checkpoint",
    "lacks_scalar_head",
    "load_training",
    "load_weights",
    "save_model",
]

_EXTRA_STATE = "_extra_state"
_OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


def save_model(
    folder: Path,
    chunks: Sequence[Any],
    state: TrainingState | None,
    iteration: int,
    *,
    staging: StagingArea | None = None,
    is_checked: bool = True,
    timeout_s: float = 600.0,
) -> RankSave:
    """Plan to write weights, and with `state` optimizer and schedule; every rank calls it.

    Args:
        folder: must not hold a checkpoint; the caller makes it visible when all ranks are done.
        chunks: model chunks of this rank.
        state: of a trained model.
        iteration: stored beside the weights.
        staging: where copies go; None: nothing is copied, and what `RankSave.write` writes is what
            the tensors hold then.
        is_checked: let Megatron check that every part of every tensor is saved by one rank.
        timeout_s: how long rank 0 waits for the others' results.

    Returns:
        This rank's part, whose `write` writes it.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    content = _weights(chunks)
    content["iteration"] = iteration
    if state is not None:
        content["optimizer"] = state.optimizer.sharded_state_dict(
            _weights(chunks), is_loading=False, metadata=_metadata()
        )
        content["scheduler"] = state.scheduler.state_dict()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return plan_save(
            folder, content, staging=staging, is_checked=is_checked, timeout_s=timeout_s
        )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written: {error}") from error


def load_weights(folder: str, chunks: Sequence[Any], *, skip: Sequence[str] = ()) -> None:
    """Read weights into the chunks, whatever layout wrote them.

    Args:
        folder: a model's folder of a checkpoint.
        chunks: model chunks of this rank.
        skip: ends of parameter names to leave as they are (the head of a critic that starts from
            a policy).

    Raises:
        CheckpointError: no checkpoint there, or it does not fit the model.
    """
    content = _weights(chunks)
    left_out = (*skip, *(() if _has_extra_state(folder) else (_EXTRA_STATE,)))
    for key in list(content):
        content[key] = {
            name: value
            for name, value in content[key].items()
            if not name.endswith(left_out or ("\0",))
        }
    loaded = _load(folder, content)
    for number, chunk in enumerate(chunks):
        with _refusing(folder):
            found = loaded[_chunk_key(number, len(chunks))]
            missing, unknown = unwrap(chunk).load_state_dict(found, strict=False)
        wrong = [name for name in missing if not name.endswith(left_out or ("\0",))] + unknown
        if wrong:
            raise CheckpointError(f"{folder} is of another model: {', '.join(wrong[:5])}")


def load_training(folder: str, state: TrainingState) -> int:
    """Read weights, optimizer and schedule; gives the iteration.

    Raises:
        CheckpointError: no checkpoint there, or it holds no optimizer that fits.
    """
    chunks = state.chunks
    content = _weights(chunks)
    inner = inner_optimizers(state.optimizer)
    for optimizer in inner:
        allocate_state(optimizer)
    content["optimizer"] = state.optimizer.sharded_state_dict(
        _weights(chunks), is_loading=True, metadata=_metadata()
    )
    loaded = _load(folder, content)
    for number, chunk in enumerate(chunks):
        with _refusing(folder):
            unwrap(chunk).load_state_dict(loaded[_chunk_key(number, len(chunks))])
    try:
        state.optimizer.load_state_dict(loaded["optimizer"])
    except (KeyError, ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its optimizer does not fit: {error!r}. Training goes on at any layout, but "
            f"models.{state.name}.use_distributed_optimizer and the optimizer stay as they were; "
            f"set models.{state.name}.load to take the weights alone"
        ) from error
    for optimizer in inner:
        separate_steps(optimizer)
        fuse_updates(optimizer)
    with _refusing(folder):
        state.scheduler.load_state_dict(loaded["scheduler"])
        return int(loaded["iteration"])


@contextmanager
def _refusing(folder: str) -> Generator[None]:
    """Whatever a module or schedule says of values that are not its own is the checkpoint's."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{folder} does not fit this model: {describe_damage(error)}"
        ) from error


def _has_extra_state(folder: str) -> bool:
    """Converted checkpoints hold none of what Megatron's modules save besides their weights."""
    if not has_checkpoint(folder):
        return False
    return any(_EXTRA_STATE in key for key in read_metadata(folder).state_dict_metadata)


def has_checkpoint(folder: str) -> bool:
    """Whether a folder holds a distributed checkpoint.

    Raises:
        CheckpointError: it does, and its metadata is damaged or no record.
    """
    if not os.path.isfile(Path(folder) / "metadata.json"):
        return False
    check_metadata(folder)
    return True


def _load(folder: str, content: dict[str, Any]) -> dict[str, Any]:
    if not has_checkpoint(folder):
        raise CheckpointError(
            f"{folder} holds no Megatron checkpoint (no metadata.json): name a model's folder, "
            "such as checkpoints/episode_000010/models/policy_trainer"
        )
    return read_checkpoint(folder, content)


def _weights(chunks: Sequence[Any]) -> dict[str, Any]:
    metadata = _metadata()
    return {
        _chunk_key(number, len(chunks)): unwrap(chunk).sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(chunks)
    }


def _chunk_key(number: int, count: int) -> str:
    return "model" if count == 1 else f"model{number}"


def _metadata() -> dict[str, Any]:
    from megatron.core import parallel_state as mpu

    group = mpu.get_data_parallel_group(with_context_parallel=True)
    return {**_OPTIMIZER_METADATA, "dp_cp_group": group}


def build_strategy() -> Any:
    """Writes through torch's own checkpoint writer.

    Megatron's writer forks helpers and takes seconds to start (seen in 0.16.1); its reader reads
    what this one writes.
    """
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
    from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Its base types a property that subclasses change as the constant False.
    base: Any = SaveShardedStrategy

    class TorchWriter(base):
        def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
            flat, mapping, renamed = torch_strategies._replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict, keep_only_main_replica=True
            )
            del mapping, renamed
            state = torch_strategies.mcore_to_pyt_state_dict(flat, is_loading=False)
            save(
                state,
                storage_writer=FileSystemWriter(checkpoint_dir, thread_count=1),
                planner=torch_strategies.MCoreSavePlanner(flatten_state_dict=False),
                no_dist=not torch.distributed.is_initialized(),
            )

        @property
        def can_handle_sharded_objects(self) -> bool:
            return True

    return TorchWriter("torch_dist", 1)


def has_adapters(folder: str) -> bool:
    """Whether a checkpoint holds low-rank adapters."""
    if not has_checkpoint(folder):
        return False
    return any(".lora_A" in key for key in read_metadata(folder).state_dict_metadata)


def lacks_scalar_head(folder: str) -> bool:
    """Whether a checkpoint is of a language model."""
    shape = saved_shape(folder, "output_layer.weight")
    return shape is None or shape[0] != 1


def saved_shape(folder: str, key: str) -> tuple[int, ...] | None:
    """Global shape of a tensor in a checkpoint; None where it is not there.

    Raises:
        CheckpointError: no checkpoint there.
    """
    if not has_checkpoint(folder):
        raise CheckpointError(f"{folder} holds no Megatron checkpoint (no metadata.json)")
    found = read_metadata(folder).state_dict_metadata.get(key)
    return tuple(found.size) if isinstance(found, TensorStorageMetadata) else None
