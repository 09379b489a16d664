"""Admits the metadata of a distributed checkpoint only if it is nothing but records.

torch keeps it as a pickle, and a pickle may run whatever it likes. So before anything else reads
the file, it is read here by an unpickler that knows torch's record classes and nothing more.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from chatlearn.errors import CheckpointError

__all__ = ["METADATA_FILE", "check_metadata"]

METADATA_FILE = ".metadata"
_CHECKPOINT = "torch.distributed.checkpoint."
_RECORDS = {
    f"{_CHECKPOINT}metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}filesystem": {"_StorageInfo"},
    "torch": {
        "Size",
        "bfloat16",
        "bool",
        "float16",
        "float32",
        "float64",
        "int32",
        "int64",
        "int8",
        "uint8",
    },
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}


def check_metadata(folder: str | Path) -> None:
    """Refuse a checkpoint whose metadata is anything but records.

    Args:
        folder: of a model in a checkpoint.

    Raises:
        CheckpointError: it is missing, damaged, or names something else; nothing of it has run.
    """
    path = Path(folder) / METADATA_FILE
    try:
        _RecordUnpickler(io.BytesIO(path.read_bytes())).load()
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from error
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """A record class of torch's; nothing else."""
        if global_name not in _RECORDS.get(module_name, ()):
            raise CheckpointError(
                f"{METADATA_FILE} names {module_name}.{global_name}, which is no record of a "
                "checkpoint: it may be an attack; do not load it"
            )
        return super().find_class(module_name, global_name)
