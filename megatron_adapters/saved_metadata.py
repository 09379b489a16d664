"""Reads the metadata of a distributed checkpoint, and admits nothing but records.

torch keeps it as a pickle, and a pickle may run whatever it likes. So it is read here and nowhere
else, by an unpickler that knows torch's record classes and nothing more. What the records say of
files is checked, too: they lie in the folder and are as long as that.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["METADATA_FILE", "check_metadata", "read_metadata"]

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


def read_metadata(folder: str | Path) -> Metadata:
    """What a checkpoint holds, and where.

    Args:
        folder: of a model in a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged, names something that is no record (nothing of it
            has run), or files that are outside the folder or too short.
    """
    path = Path(folder) / METADATA_FILE
    try:
        found = _RecordUnpickler(io.BytesIO(path.read_bytes())).load()
        _check_entries(found)
        _check_files(Path(folder), found.storage_data)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from error
    except Exception as error:  # noqa: BLE001 - a damaged pickle raises anything
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return found


def check_metadata(folder: str | Path) -> None:
    """Refuse a checkpoint whose metadata `read_metadata` refuses."""
    read_metadata(folder)


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """A record class of torch's; nothing else."""
        if global_name not in _RECORDS.get(module_name, ()):
            raise CheckpointError(
                f"{METADATA_FILE} names {module_name}.{global_name}, which is no record of a "
                "checkpoint: it may be an attack; do not load it"
            )
        return super().find_class(module_name, global_name)


def _check_entries(found: Any) -> None:
    """See that the records are put together as torch puts them together."""
    import torch
    from torch.distributed.checkpoint import metadata as kinds

    _expect(found, kinds.Metadata)
    for key, entry in cast("Mapping[Any, Any]", found.state_dict_metadata).items():
        _expect(key, str)
        _expect(entry, (kinds.TensorStorageMetadata, kinds.BytesStorageMetadata))
        if not isinstance(entry, kinds.TensorStorageMetadata):
            continue
        _expect(entry.properties, kinds.TensorProperties)
        _expect(entry.properties.dtype, torch.dtype)
        _expect(entry.size, torch.Size)
        for chunk in entry.chunks:
            _expect(chunk, kinds.ChunkStorageMetadata)
            _expect((chunk.offsets, chunk.sizes), tuple)
            for at, length, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True):
                if not 0 <= at <= at + length <= whole:
                    raise ValueError(f"{key} has a part at {at} of length {length} of {whole}")


def _check_files(folder: Path, places: Any) -> None:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    sizes: dict[str, int] = {}
    for index, place in cast("Mapping[Any, Any]", places).items():
        _expect(index, MetadataIndex)
        name = place.relative_path
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{METADATA_FILE} names {name!r}, a file outside {folder}")
        if name not in sizes:
            sizes[name] = _size_of(folder / name)
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise CheckpointError(
                f"{folder / name} has {sizes[name]} bytes, and {METADATA_FILE} places "
                f"{index.fqn} at {place.offset}, {place.length} bytes long: it is cut short, or "
                "the two are of different checkpoints"
            )


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from error


def _expect(value: Any, kind: Any) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"a {type(value).__name__} stands where {kind} is expected")
