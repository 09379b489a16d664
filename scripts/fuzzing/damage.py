"""Ways to damage a file, by lot."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["Attack", "damage_bytes", "damage_file", "draw_json"]

_SMALL_WORDS = ("", "x", "../../x", "\0", "model", "e" * 300, "\udcff", "${HOME}", "*", "NaN")
_NUMBERS = (0, -1, 1, 2**31, 2**63, -(2**70), 10**400, 0.5, float("nan"), float("inf"), 1e-300)


class Attack:
    """Makes a folder where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self._marker,))


def damage_bytes(content: bytes, lots: random.Random) -> tuple[bytes, str]:
    """The content damaged in one way, and which."""
    ways: Sequence[Callable[[bytes, random.Random], tuple[bytes, str]]] = (
        _truncate,
        _truncate,
        _flip,
        _flip,
        _flip,
        _blank,
        _cut_out,
        _repeat,
    )
    return lots.choice(ways)(content, lots) if content else (b"\0", "a byte where there was none")


def damage_file(path: Path, others: Sequence[Path], marker: Path, lots: random.Random) -> str:
    """Damage a file in one way; says how.

    Args:
        path: the file.
        others: files that may be put in its place.
        marker: folder that appears where code from the file is run.
        lots: what is drawn from.
    """
    way = lots.random()
    if way < 0.08:
        path.unlink()
        return "removed"
    if way < 0.13:
        path.write_bytes(b"")
        return "emptied"
    if way < 0.18:
        path.unlink()
        path.mkdir()
        return "a folder in its place"
    if way < 0.3 and others:
        other = lots.choice(others)
        shutil.copyfile(other, path)
        return f"{other.parent.name}/{other.name} in its place"
    if way < 0.38:
        path.write_bytes(pickle.dumps(Attack(marker), protocol=lots.choice((2, 4))))
        return "a pickle in its place that runs something"
    if path.suffix == ".json" and way < 0.85:
        return _damage_json(path, lots)
    content, how = damage_bytes(path.read_bytes(), lots)
    path.write_bytes(content)
    return how


def draw_json(lots: random.Random, depth: int = 0) -> Any:
    """Any value that JSON and YAML know."""
    kind = lots.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return lots.choice((None, True, False))
    if kind == 1:
        return lots.choice(_NUMBERS)
    if kind == 2:
        return lots.randrange(-5, 100)
    if kind <= 4:
        return lots.choice(_SMALL_WORDS)
    if kind == 5:
        return [draw_json(lots, depth + 1) for _ in range(lots.randrange(4))]
    keys = [lots.choice(_SMALL_WORDS) for _ in range(lots.randrange(4))]
    return {key: draw_json(lots, depth + 1) for key in keys}


def _damage_json(path: Path, lots: random.Random) -> str:
    """Another value somewhere in it."""
    if lots.random() < 0.1:
        path.write_text("[" * 100_000, encoding="utf-8")
        return "nested deeply"
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        # It was damaged before.
        changed, how = damage_bytes(path.read_bytes(), lots)
        path.write_bytes(changed)
        return how
    place = "the whole"
    if lots.random() < 0.1 or not _keys_of(content):
        content = draw_json(lots)
    else:
        place = _change_entry(content, lots)
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"another value at {place[:80]}"


def _change_entry(content: Any, lots: random.Random) -> str:
    """Put another value somewhere into a list or dict, or take one out; says where."""
    inner: Any = content
    place: list[str] = []
    while True:
        key = lots.choice(_keys_of(inner))
        place.append(str(key))
        if not _keys_of(inner[key]) or lots.random() < 0.3:
            break
        inner = inner[key]
    if lots.random() < 0.2:
        del inner[key]
    else:
        inner[key] = draw_json(lots)
    return ".".join(place)


def _keys_of(value: Any) -> list[Any]:
    """Keys of a dict, indices of a list; nothing of anything else."""
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value))
    return list(range(len(cast("list[Any]", value)))) if isinstance(value, list) else []


def _truncate(content: bytes, lots: random.Random) -> tuple[bytes, str]:
    length = lots.randrange(len(content))
    return content[:length], f"cut to {length} of {len(content)} bytes"


def _flip(content: bytes, lots: random.Random) -> tuple[bytes, str]:
    count = lots.choice((1, 1, 2, 8, 64))
    changed = bytearray(content)
    for _ in range(count):
        changed[lots.randrange(len(changed))] ^= 1 << lots.randrange(8)
    return bytes(changed), f"{count} bits flipped"


def _blank(content: bytes, lots: random.Random) -> tuple[bytes, str]:
    start = lots.randrange(len(content))
    length = min(lots.choice((1, 16, 512)), len(content) - start)
    value = lots.choice((b"\0", b"\xff", b"A"))
    return content[:start] + value * length + content[start + length :], f"{length} bytes blanked"


def _cut_out(content: bytes, lots: random.Random) -> tuple[bytes, str]:
    start = lots.randrange(len(content))
    length = lots.choice((1, 4, 100))
    return content[:start] + content[start + length :], f"{length} bytes cut out"


def _repeat(content: bytes, lots: random.Random) -> tuple[bytes, str]:
    start = lots.randrange(len(content))
    end = start + lots.choice((1, 8, 1000))
    return content[:end] + content[start:end] + content[end:], "a part repeated"
