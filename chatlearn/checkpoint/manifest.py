"""A checkpoint's manifest: size and SHA-256 of every file in it, and of the list itself."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

__all__ = [
    "MANIFEST_FILE",
    "FileSum",
    "list_files",
    "sum_file",
    "sum_files",
    "sync_folder",
    "verify_checkpoint",
    "write_manifest",
]

MANIFEST_FILE = "manifest.json"
_FORMAT = 1
_BLOCK_BYTES = 1 << 20
_NUM_THREADS = 4


@dataclass(frozen=True)
class FileSum:
    """What one file holds: its length, and the SHA-256 of its content in hex."""

    num_bytes: int
    sha256: str


def list_files(folder: Path) -> list[str]:
    """Every file under a folder but the manifest, as relative paths with `/`, sorted.

    Raises:
        CheckpointError: something in it is neither file nor folder (a link may lead anywhere).
    """
    found: list[str] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path} is no plain file: a checkpoint holds files only")
        if path.is_file() and name != MANIFEST_FILE:
            found.append(name)
    return found


def sum_file(path: Path, *, is_synced: bool = False) -> FileSum:
    """Read a file through; with `is_synced` also see that it is on the disk."""
    digest = hashlib.sha256()
    num_bytes = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
        if is_synced:
            os.fsync(file.fileno())
    return FileSum(num_bytes, digest.hexdigest())


def sum_files(folder: Path, names: Iterable[str], *, is_synced: bool = False) -> dict[str, FileSum]:
    """`sum_file` of several files of a folder, a few at a time."""
    chosen = list(names)
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        waiting = [pool.submit(sum_file, folder / name, is_synced=is_synced) for name in chosen]
        return {name: each.result() for name, each in zip(chosen, waiting, strict=True)}


def sync_folder(folder: Path) -> None:
    """See that a folder's entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Write the manifest of a folder whose files are all there."""
    files = {name: [sums[name].num_bytes, sums[name].sha256] for name in sorted(sums)}
    content = {"format": _FORMAT, "files": files, "sha256": _sum_list(files)}
    path = folder / MANIFEST_FILE
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify_checkpoint(folder: Path, *, is_quick: bool = False) -> None:
    """Read a checkpoint through and compare every file with the manifest.

    Args:
        folder: of the checkpoint.
        is_quick: compare only that the files are there, and their lengths.

    Raises:
        CheckpointError: names the first file that is missing, cut short, changed or unreadable.
    """
    try:
        expected = _read_manifest(folder / MANIFEST_FILE)
        for name, known in expected.items():
            num_bytes = (folder / name).stat().st_size
            if num_bytes != known.num_bytes:
                raise CheckpointError(
                    f"{folder / name} has {num_bytes} bytes, {known.num_bytes} were written"
                )
        for name, found in sum_files(folder, () if is_quick else expected).items():
            if found != expected[name]:
                raise CheckpointError(f"{folder / name} is damaged: its checksum differs")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename} is missing: the checkpoint is incomplete"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error}") from error


def _read_manifest(path: Path) -> dict[str, FileSum]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise CheckpointError(f"{path} is of format {content['format']}, known is {_FORMAT}")
        files = cast("dict[str, list[Any]]", content["files"])
        if content["sha256"] != _sum_list(files):
            raise CheckpointError(f"{path} is damaged: its own checksum differs")
        found = {name: FileSum(int(entry[0]), str(entry[1])) for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    for name in found:
        if name.startswith("/") or ".." in name.split("/"):
            raise CheckpointError(f"{path} names {name!r}, which lies outside the checkpoint")
    return found


def _sum_list(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
