"""A Hugging Face folder's weights: memory-mapped, read slice by slice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from chatlearn.errors import CheckpointError, in_one_line
from chatlearn.parallel.sharding import Box
from megatron_adapters.weights.safetensors_names import INDEX_FILE, SINGLE_FILE

__all__ = ["SafetensorsFolder"]

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class SafetensorsFolder:
    """The tensors of a folder by name. Files stay mapped until `close`.

    Nothing is read before it is asked for: a slice of a tensor is a view of the mapped file.

    Args:
        folder: with `model.safetensors`, or an index and the files that it names.
        single_file: another name of the one file; then there is no index.

    Raises:
        CheckpointError: no weights there, or a file is missing or damaged; names it.
    """

    def __init__(self, folder: str | Path, *, single_file: str | None = None) -> None:
        self.folder = Path(folder)
        self._files: dict[Path, Any] = {}
        self._tensors: dict[str, _Tensor] = {}
        try:
            for file, wanted in _find_files(self.folder, single_file).items():
                self._add_file(file, wanted)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unmap the files; views that are still there keep theirs alive."""
        self._files.clear()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    @property
    def names(self) -> Iterable[str]:
        """Of all tensors."""
        return self._tensors.keys()

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._tensors[name].file

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._tensors[name].shape

    def dtype_of(self, name: str) -> str:
        """The dtype of a tensor, torch's name; safetensors' where torch has none."""
        return _DTYPES.get(self._tensors[name].dtype, self._tensors[name].dtype)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A box of a tensor, as a view of the mapped file (do not write to it)."""
        part = self._files[self.file_of(name)].get_slice(name)
        slices = tuple(
            slice(start, start + size) for start, size in zip(box.offset, box.shape, strict=True)
        )
        return part[slices]

    def read_whole(self, name: str) -> torch.Tensor:
        """All of a tensor; see `read`."""
        shape = self.shape_of(name)
        return self.read(name, Box((0,) * len(shape), shape))

    def _add_file(self, file: Path, wanted: frozenset[str] | None) -> None:
        opened = _open(file)
        self._files[file] = opened
        held = frozenset(opened.keys())
        missing = sorted((wanted or held) - held)
        if missing:
            raise CheckpointError(
                f"{file} lacks {_some(missing)}, which {INDEX_FILE} says it holds: the folder is "
                "incomplete or of two versions"
            )
        for name in held:
            part = opened.get_slice(name)
            if name in self._tensors:
                raise CheckpointError(
                    f"{name} is in {self.file_of(name).name} and in {file.name} of {self.folder}"
                )
            self._tensors[name] = _Tensor(file, tuple(part.get_shape()), str(part.get_dtype()))


def _find_files(folder: Path, single_file: str | None) -> Mapping[Path, frozenset[str] | None]:
    """The files, and which tensors the index wants of each; None: there is no index."""
    index = folder / INDEX_FILE
    if single_file is not None:
        if not (folder / single_file).is_file():
            raise CheckpointError(f"{folder} holds no {single_file}")
        return {folder / single_file: None}
    if not index.is_file():
        file = folder / SINGLE_FILE
        if not file.is_file():
            raise CheckpointError(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: weights in another format "
                "must be saved anew with transformers' save_pretrained"
            )
        return {file: None}
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        entries = cast("dict[str, str]", content["weight_map"])
        by_file: dict[str, set[str]] = {}
        for name, file in entries.items():
            by_file.setdefault(file, set()).add(name)
        strange = [file for file in by_file if Path(file).name != file]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is no index of safetensors files: {in_one_line(error)}"
        ) from error
    if strange:
        raise CheckpointError(f"{index} names files outside the folder: {_some(strange)}")
    return {folder / file: frozenset(names) for file, names in sorted(by_file.items())}


def _open(file: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: {INDEX_FILE} names it")
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged or no safetensors file ({error}): copy it again"
        ) from error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
