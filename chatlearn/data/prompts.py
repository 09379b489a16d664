"""Reads prompts: JSON lines, JSON, CSV, Parquet, plain text, folders of these, saved `datasets`."""

from __future__ import annotations

import csv
import importlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read_prompts"]

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")
# What `datasets` saves: with splits, and without.
_SAVED_MARKS = ("dataset_dict.json", "state.json")


def read_prompts(
    path: str | Path, *, split: str | None = None, columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The rows of a file or folder: one mapping per prompt.

    `.jsonl`: an object per line; `.json`: a list of objects or texts; `.csv`: a row each;
    `.parquet`: a row each; any other file: a text per line. A folder is what the `datasets`
    library saved, or holds such files, which are read in the order of their names.

    Args:
        path: of the file or folder.
        split: of a folder that `datasets` saved with splits.
        columns: new names of columns, each with its name in the file; other columns keep theirs.

    Raises:
        DataError: something cannot be read, is not of its format, lacks a column, or holds no
            prompt.
    """
    source = Path(path)
    rows = _read_folder(source, split) if os.path.isdir(source) else _read_file(source)
    if split is not None and not os.path.isdir(source):
        raise DataError(f"{source} is a file and has no split: leave split={split!r} out")
    if not rows:
        raise DataError(f"prompt file {source} holds no prompt")
    if not columns:
        return rows
    return [_rename(row, columns, f"{source}, row {n}") for n, row in enumerate(rows)]


def _rename(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> dict[str, Any]:
    missing = [old for old in columns.values() if old not in row]
    if missing:
        raise DataError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(map(str, row))}"
        )
    taken = set(columns.values())
    kept = {key: value for key, value in row.items() if key not in taken}
    return {**kept, **{new: row[old] for new, old in columns.items()}}


def _read_folder(folder: Path, split: str | None) -> list[dict[str, Any]]:
    if any((folder / name).is_file() for name in _SAVED_MARKS):
        return _read_saved(folder, split)
    if split is not None and os.path.isdir(folder / split):
        return _read_folder(folder / split, None)
    if split is not None:
        raise DataError(f"{folder} has no split {split!r}: it holds no folder of that name")
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise DataError(
            f"folder {folder} is none that `datasets` saved, and holds no file that ends in "
            f"{', '.join(_SUFFIXES)}"
        )
    return [row for file in files for row in _read_file(file)]


def _read_saved(folder: Path, split: str | None) -> list[dict[str, Any]]:
    """What `save_to_disk` wrote, read from its Arrow files."""
    if (folder / _SAVED_MARKS[0]).is_file():
        try:
            splits = json.loads((folder / _SAVED_MARKS[0]).read_text(encoding="utf-8"))["splits"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / _SAVED_MARKS[0]} cannot be read: {error}") from error
        if split not in splits:
            raise DataError(
                f"{folder} has the splits {', '.join(splits)}: name one of them (split), got "
                f"{split!r}"
            )
        return _read_saved(folder / str(split), None)
    if split is not None:
        raise DataError(f"{folder} has no splits: leave split={split!r} out")
    try:
        state = json.loads((folder / _SAVED_MARKS[1]).read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged: {error}") from error
    if state.get("_indices_data_files") or any(file.parent != folder for file in files):
        raise DataError(f"{folder} refers to other files: save the data set anew, flattened")
    arrow: Any = _import_arrow("pyarrow", folder)
    rows: list[dict[str, Any]] = []
    for file in files:
        try:
            with arrow.memory_map(str(file)) as mapped:
                rows += arrow.ipc.open_stream(mapped).read_all().to_pylist()
        except (OSError, arrow.ArrowInvalid) as error:
            raise DataError(f"{file} is damaged: {error}") from error
    return rows


def _read_file(file: Path) -> list[dict[str, Any]]:
    readers = {
        ".jsonl": _read_json_lines,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    try:
        rows = readers.get(file.suffix.lower(), _read_lines)(file)
    except OSError as error:
        raise DataError(f"prompt file {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"prompt file {file} is not UTF-8 text: {error.reason}") from error
    return rows


def _read_json_lines(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(_as_row(json.loads(line)))
            except json.JSONDecodeError as error:
                raise DataError(f"{file}:{number}: not valid JSON: {error.msg}") from error
    return rows


def _read_json(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(content, list):
        raise DataError(f"{file}: expected a list of prompts, got {type(content).__name__}")
    return [_as_row(entry) for entry in cast("list[Any]", content)]


def _read_csv(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():
            raise DataError(f"{file}:{number}: the row has not as many fields as the header")
    return rows


def _read_parquet(file: Path) -> list[dict[str, Any]]:
    parquet: Any = _import_arrow("pyarrow.parquet", file)
    try:
        return parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no Parquet file, or damaged: {error}") from error


def _import_arrow(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{path}: Parquet and Arrow files need pyarrow, which is not installed: "
            "pip install pyarrow, or convert the file to JSON lines"
        ) from error


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [{"prompt": line} for line in lines if line.strip()]


def _as_row(entry: Any) -> dict[str, Any]:
    return dict(cast("dict[str, Any]", entry)) if isinstance(entry, dict) else {"prompt": entry}
