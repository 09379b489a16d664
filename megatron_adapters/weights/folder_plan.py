"""Which file holds which tensor of a Hugging Face folder, and at which byte. Pure: no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from chatlearn.errors import ConfigError
from chatlearn.parallel.sharding import Box
from megatron_adapters.weights.safetensors_names import SINGLE_FILE

__all__ = ["FilePlan", "FolderPlan", "TensorPlace", "build_index", "plan_files"]

# safetensors' name and the bytes of an element, by torch's name.
_KINDS = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies.

    Attributes:
        file: name of the file.
        start: of its first byte in the file.
        shape: of the tensor.
        dtype: torch's name.
    """

    file: str
    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor."""
        return prod(self.shape) * _KINDS[self.dtype][1]

    def run_of(self, box: Box) -> tuple[int, int] | None:
        """First byte and length of a box that lies in one piece in the file; None: it does not."""
        rest = list(zip(box.offset, box.shape, self.shape, strict=True))
        while rest and rest[-1][:2] == (0, rest[-1][2]):
            rest.pop()
        if any(length != 1 for _, length, _ in rest[:-1]):
            return None
        size = _KINDS[self.dtype][1]
        strides = [prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        first = sum(at * stride for at, stride in zip(box.offset, strides, strict=True))
        return self.start + first * size, box.num_elements * size


@dataclass(frozen=True)
class FilePlan:
    """One file.

    Attributes:
        name: of the file.
        header: its first bytes.
        num_bytes: of the whole file.
    """

    name: str
    header: bytes
    num_bytes: int


@dataclass(frozen=True)
class FolderPlan:
    """All files of a folder, and where each tensor lies."""

    files: tuple[FilePlan, ...]
    places: Mapping[str, TensorPlace]


def plan_files(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    max_file_bytes: int,
    *,
    single_file: str = SINGLE_FILE,
) -> FolderPlan:
    """Spread tensors over files, in the order that they are given in.

    Args:
        shapes: by name.
        dtypes: by name, torch's.
        max_file_bytes: of a file's tensors together; a larger tensor has a file of its own.
        single_file: the file's name, where there is one.

    Raises:
        ConfigError: a dtype that is not written.
    """
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        if dtypes[name] not in _KINDS:
            raise ConfigError(f"{name}: dtype {dtypes[name]}, expected one of {', '.join(_KINDS)}")
        size = prod(shape) * _KINDS[dtypes[name]][1]
        if not groups or size > room:
            groups.append([])
            room = max_file_bytes
        groups[-1].append(name)
        room -= size
    count = len(groups)
    files: list[FilePlan] = []
    places: dict[str, TensorPlace] = {}
    for number, group in enumerate(groups, 1):
        name = single_file if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        files.append(_plan_file(name, group, shapes, dtypes, places))
    return FolderPlan(tuple(files), places)


def build_index(plan: FolderPlan) -> dict[str, Any] | None:
    """The content of the index file; None where one file holds everything."""
    if len(plan.files) == 1:
        return None
    total = sum(place.num_bytes for place in plan.places.values())
    entries = {name: place.file for name, place in plan.places.items()}
    return {"metadata": {"total_size": total}, "weight_map": entries}


def _plan_file(
    file: str,
    names: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    places: dict[str, TensorPlace],
) -> FilePlan:
    """The largest elements come first, so that each tensor is aligned to its own."""
    ordered = sorted(names, key=lambda name: -_KINDS[dtypes[name]][1])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in ordered:
        kind, size = _KINDS[dtypes[name]]
        end = at + prod(shapes[name]) * size
        header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    for name in ordered:
        first = header[name]["data_offsets"][0]
        places[name] = TensorPlace(file, start + first, shapes[name], dtypes[name])
    return FilePlan(file, len(text).to_bytes(8, "little") + text, start + at)
