"""Writes a Hugging Face folder: each rank its own slices, straight to where they belong."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch

from chatlearn.errors import CheckpointError
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.weights.config_file import CONFIG_FILE
from megatron_adapters.weights.folder_plan import FolderPlan, TensorPlace, build_index
from megatron_adapters.weights.safetensors_names import INDEX_FILE, TOKENIZER_FILES

__all__ = ["FolderWriter", "begin_folder", "discard_folder", "finish_folder"]


def begin_folder(target: Path, plan: FolderPlan) -> Path:
    """Make the draft of a folder, with files of their full size; one process does this.

    Args:
        target: where the folder will be; must not exist, or be empty.
        plan: of its files.

    Returns:
        The draft's path, beside the target, for `FolderWriter` and `finish_folder`.

    Raises:
        CheckpointError: the target is in use, or the disk has no room.
    """
    draft = target.with_name(f".{target.name}.partial")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists already: name another folder, or remove it")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        needed, free = sum(file.num_bytes for file in plan.files), shutil.disk_usage(draft).free
        if needed > free:
            raise CheckpointError(
                f"{target} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free"
            )
        for file in plan.files:
            with (draft / file.name).open("wb") as opened:
                opened.write(file.header)
                opened.truncate(file.num_bytes)
    except OSError as error:
        discard_folder(draft)
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from error
    except CheckpointError:
        discard_folder(draft)
        raise
    return draft


def finish_folder(
    draft: Path,
    target: Path,
    plan: FolderPlan,
    config: Mapping[str, Any],
    tokenizer: Path | None,
    config_file: str = CONFIG_FILE,
) -> None:
    """Add the small files, and make the folder visible by one rename; one process does this.

    Args:
        draft: from `begin_folder`, all tensors written.
        target: where the folder shall be.
        plan: of its files.
        config: content of config.json.
        tokenizer: folder or file whose tokenizer files go along; None: there are none.
        config_file: name of the config's file.

    Raises:
        CheckpointError: it cannot be written.
    """
    try:
        index = build_index(plan)
        if index is not None:
            _write_json(draft / INDEX_FILE, index)
        _write_json(draft / config_file, config)
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, draft)
        if target.exists():
            target.rmdir()
        os.replace(draft, target)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error.strerror}") from error


def discard_folder(draft: Path) -> None:
    """Remove a draft that will not be finished."""
    shutil.rmtree(draft, ignore_errors=True)


class FolderWriter:
    """Writes slices of tensors into a draft's files; several processes may do so at once.

    Args:
        draft: from `begin_folder`.
        plan: of its files.
        on_bytes: told how many bytes were written, now and then; None: nobody is.
    """

    def __init__(
        self, draft: Path, plan: FolderPlan, on_bytes: Callable[[int], None] | None = None
    ) -> None:
        self._draft = draft
        self._plan = plan
        self._on_bytes = on_bytes
        self._files: dict[str, int] = {}
        self._maps: dict[str, torch.Tensor] = {}

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        self.close(is_durable=kind is None)

    def close(self, *, is_durable: bool = True) -> None:
        """Close the files, after what was written has reached the disk."""
        self._maps.clear()
        for file in self._files.values():
            try:
                if is_durable:
                    os.fsync(file)
            finally:
                os.close(file)
        self._files.clear()

    def write(self, shard: TensorShard, values: torch.Tensor) -> None:
        """Write a slice.

        Args:
            shard: in the naming of the folder.
            values: of the shard's box, in any shape with its elements in order; rounded once where
                the folder has another dtype.

        Raises:
            CheckpointError: the disk fails.
        """
        place = self._plan.places[shard.key]
        dtype: torch.dtype = getattr(torch, place.dtype)
        run = place.run_of(shard.box)
        try:
            if run is None:
                self._write_rows(place, shard, values)
            else:
                data = values.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
                self._write_run(place.file, data, run[0])
        except OSError as error:
            raise CheckpointError(
                f"{self._draft / place.file} cannot be written: {error.strerror}"
            ) from error
        if self._on_bytes is not None:
            self._on_bytes(shard.box.num_elements * dtype.itemsize)

    def _write_run(self, file: str, data: torch.Tensor, at: int) -> None:
        view = memoryview(cast("Any", data.numpy()))
        opened = self._open(file)
        while view:
            done = os.pwrite(opened, view[: 1 << 26], at)
            view, at = view[done:], at + done

    def _write_rows(self, place: TensorPlace, shard: TensorShard, values: torch.Tensor) -> None:
        """Columns of a matrix: many short runs, written through a mapping of the file."""
        if place.file not in self._maps:
            path = self._draft / place.file
            size = path.stat().st_size
            self._maps[place.file] = torch.from_file(
                str(path), shared=True, size=size, dtype=torch.uint8
            )
        mapped = self._maps[place.file][place.start : place.start + place.num_bytes]
        whole = mapped.view(getattr(torch, place.dtype)).view(place.shape)
        slices = tuple(
            slice(start, start + size)
            for start, size in zip(shard.box.offset, shard.box.shape, strict=True)
        )
        region = whole[slices]
        region.copy_(values.detach().view(region.shape))
        self._open(place.file)

    def _open(self, file: str) -> int:
        if file not in self._files:
            self._files[file] = os.open(self._draft / file, os.O_RDWR)
        return self._files[file]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _copy_tokenizer(source: Path, draft: Path) -> None:
    if source.is_file():
        shutil.copyfile(source, draft / "tokenizer.model")
        return
    for name in TOKENIZER_FILES:
        with suppress(FileNotFoundError):
            shutil.copyfile(source / name, draft / name)
