# pyright: standard, reportPrivateImportUsage=false
"""Reads Megatron's distributed format without running code of the files.

Seen in megatron-core 0.16.1 and torch 2.13: the metadata is unpickled as it is, objects among the
sharded data by `torch.load(weights_only=False)`, and what `common.pt` may do depends on an
environment variable. Here all three admit records, tensors and plain values only.
"""

from __future__ import annotations

import pickle
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chatlearn.errors import CheckpointError, in_one_line
from megatron_adapters.saved_metadata import read_metadata

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader

__all__ = ["describe_damage", "open_reader", "read_checkpoint"]

_COMMON_FILE = "common.pt"
_NAMED = re.compile(r"GLOBAL ([\w.]+)")


def read_checkpoint(folder: str, content: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded state dict; every rank calls it.

    Args:
        folder: of a model in a checkpoint.
        content: what is wanted, as Megatron describes it.

    Returns:
        The wanted values, and what is saved once for all ranks.

    Raises:
        CheckpointError: something is missing, damaged, of another model, or would run code.
    """
    from megatron.core import dist_checkpointing

    # torch's own is a BaseException.
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings():
            # Megatron calls functions that torch deprecates (seen in megatron-core 0.16.1).
            warnings.simplefilter("ignore", FutureWarning)
            loaded: Any = dist_checkpointing.load(
                content,
                folder,
                sharded_strategy=_build_sharded_strategy(),
                common_strategy=_build_common_strategy(),
            )
    except (Exception, CheckpointException) as error:  # noqa: BLE001 - damaged files raise anything
        raise CheckpointError(
            f"{folder} cannot be loaded into this model: {describe_damage(error)}"
        ) from error
    return loaded


def open_reader(folder: str | Path) -> FileSystemReader:
    """Torch's reader of a folder, whose metadata comes from `read_metadata`."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class RecordReader(FileSystemReader):
        _found: Any = None

        def read_metadata(self, *_arguments: Any, **_options: Any) -> Any:
            if self._found is None:
                self._found = read_metadata(str(self.path))
                if self._found.storage_meta is None:
                    self._found.storage_meta = StorageMeta()
            self._found.storage_meta.load_id = self.load_id
            return self._found

    return RecordReader(str(folder))


def describe_damage(error: BaseException) -> str:
    """One line on what went wrong, and on which rank."""
    failures: dict[int, Any] = getattr(error, "failures", {})
    for rank, failure in failures.items():
        cause = failure[0] if isinstance(failure, tuple) else failure
        return f"rank {rank}: {describe_damage(cause)}"
    if isinstance(error, pickle.UnpicklingError):
        # torch's own words are a page of advice on how to run it all the same.
        named = _NAMED.search(str(error))
        what = f" (it names {named[1]})" if named else ""
        return f"damaged, or more than tensors and plain values{what}: do not trust it"
    return in_one_line(error)


def _build_sharded_strategy() -> Any:
    """As Megatron's own, with another reader and planner."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint._traverse import set_element

    class PlainPlanner(torch_strategies.MCoreLoadPlanner):
        def load_bytes(self, read_item: Any, value: Any) -> None:
            found = torch.load(value, map_location="cpu", weights_only=True)
            place = self.mappings[read_item.dest_index.fqn]
            set_element(self.original_state_dict, place, found)

    class PlainReader(torch_strategies.TorchDistLoadShardedStrategy):
        def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
            tensors = [t for t in nested_values(sharded_state_dict) if isinstance(t, ShardedTensor)]
            flat, mapping, renamed = torch_strategies._replace_state_dict_keys_with_sharded_keys(
                sharded_state_dict
            )
            state = torch_strategies.mcore_to_pyt_state_dict(flat, is_loading=True)
            planner = PlainPlanner(
                shapes_validation_sharded_tensors=[
                    t for t in tensors if not t.allow_shape_mismatch
                ],
                allow_shape_mismatch_sharded_tensors={
                    t.key: t for t in tensors if t.allow_shape_mismatch
                },
            )
            # `checkpoint.load` wants the same keys on all ranks.
            checkpoint.load_state_dict(state, open_reader(checkpoint_dir), planner=planner)
            unwrapped: Any = {
                key: torch_strategies._unwrap_pyt_sharded_tensor(value)
                for key, value in state.items()
            }
            found = torch_strategies._replace_sharded_keys_with_state_dict_keys(
                unwrapped, mapping, renamed
            )
            torch_strategies._restore_dict_types(found, sharded_state_dict)
            return found

    return PlainReader()


def _build_common_strategy() -> Any:
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy

    class PlainCommon(TorchCommonLoadStrategy):
        def load_common(self, checkpoint_dir: Any) -> Any:
            path = Path(checkpoint_dir) / _COMMON_FILE
            found = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(found, dict):
                raise CheckpointError(f"{path} holds a {type(found).__name__}, expected a dict")
            return found

    return PlainCommon()
