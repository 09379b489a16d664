# pyright: standard, reportPrivateImportUsage=false
"""Loads what a run has saved, every tensor of it, as a run that goes on from it would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chatlearn.checkpoint.folders import find_checkpoints, find_damage
from chatlearn.checkpoint.run_state import read_run_state
from chatlearn.errors import CheckpointError
from megatron_adapters.checkpoint_reader import describe_damage, open_reader
from megatron_adapters.saved_metadata import METADATA_FILE, read_metadata

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["find_bad_checkpoints", "load_whole"]


def find_bad_checkpoints(run_dirs: list[Path]) -> list[str]:
    """Checkpoints of these runs that do not verify or do not load, each with the reason."""
    bad: list[str] = []
    for run_dir in run_dirs:
        for path in find_checkpoints(run_dir / "checkpoints"):
            reason = find_damage(path) or _why_not_loadable(path)
            if reason is not None:
                bad.append(f"{path}: {reason}")
    return bad


def load_whole(checkpoint: Path) -> int:
    """Load every model and every `.pt` of a checkpoint; gives how many tensors its models have.

    Raises:
        CheckpointError: a trained model is not there, or has nothing in it.
        Exception: whatever a damaged file raises.
    """
    state = read_run_state(checkpoint)
    models = checkpoint / "models"
    missing = [name for name in (*state.trained, *state.stale) if not (models / name).is_dir()]
    if missing:
        raise CheckpointError(f"models/ lacks {', '.join(missing)}")
    for path in checkpoint.rglob("*.pt"):
        torch.load(path, map_location="cpu", weights_only=True)
    counts = {path.name: _count_tensors(path) for path in sorted(models.iterdir())}
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise CheckpointError(f"no tensor is saved of {', '.join(empty)}")
    return sum(counts.values())


def _why_not_loadable(checkpoint: Path) -> str | None:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        load_whole(checkpoint)
    # torch's own is a BaseException.
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - damaged files raise anything
        return f"does not load: {describe_damage(error)}"
    return None


def _count_tensors(folder: Path) -> int:
    if (folder / METADATA_FILE).is_file():
        return _read_distributed(folder)
    return sum(
        _count(torch.load(path, map_location="cpu", weights_only=True))
        for path in folder.glob("*.pt")
    )


def _read_distributed(folder: Path) -> int:
    """Read every entry of Megatron's distributed format; gives how many tensors there are."""
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    class PlainPlanner(_EmptyStateDictLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            torch.load(value, map_location="cpu", weights_only=True)

    state: dict[str, Any] = {}
    _load_state_dict(state, open_reader(folder), planner=PlainPlanner(), no_dist=True)
    wanted = {
        name: entry
        for name, entry in read_metadata(folder).state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    for name, entry in wanted.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) < entry.size.numel():
            raise CheckpointError(f"{folder} has only a part of {name}")
    found = _count(state)
    if found < len(wanted):
        raise CheckpointError(f"{folder} names {len(wanted)} tensors, of which {found} load")
    return found


def _count(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return 1
    if isinstance(value, dict):
        return sum(map(_count, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_count, value))
    return 0
