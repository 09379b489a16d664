"""Reads prompt files: JSON lines, JSON, CSV, Parquet (with pyarrow) and plain text."""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any, cast

from chatlearn.errors import DataError

__all__ = ["read_prompts"]


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file: one mapping per prompt.

    `.jsonl`: an object per line; `.json`: a list of objects or texts; `.csv`: a row each;
    `.parquet`: a row each; anything else: a text per line.

    Raises:
        DataError: the file cannot be read, is not of its format, or holds no prompt.
    """
    file = Path(path)
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
    if not rows:
        raise DataError(f"prompt file {file} holds no prompt")
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
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(
            f"prompt file {file}: Parquet needs pyarrow, which is not installed: "
            "pip install pyarrow, or convert the file to JSON lines"
        ) from error
    return parquet.read_table(file).to_pylist()


def _read_lines(file: Path) -> list[dict[str, Any]]:
    lines = file.read_text(encoding="utf-8").splitlines()
    return [{"prompt": line} for line in lines if line.strip()]


def _as_row(entry: Any) -> dict[str, Any]:
    return dict(cast("dict[str, Any]", entry)) if isinstance(entry, dict) else {"prompt": entry}
