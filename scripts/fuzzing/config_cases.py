"""Damaged configs: as text, as values, and by overrides."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml

from scripts.fuzzing.damage import damage_bytes, draw_json

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping

__all__ = ["OverrideMaker", "TextMaker", "ValueMaker"]

ROOT = Path(__file__).resolve().parents[2]
_DEVICES = (None, 1, 8, 64)
_SCALAR = re.compile(r"(?m)(?<=: )[^\n#{\[]+")
_BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
_FRAGMENTS = (
    "!!python/object/apply:os.mkdir ['{marker}']",
    "!!python/object/new:os.mkdir ['{marker}']",
    "!!python/name:os.system",
    "!!python/object/apply:os.system ['mkdir {marker}']",
    "{{ ''.__class__.__mro__ }}",
    "${{UNSET_VARIABLE}}",
    "${{HOME}}",
    "${{HOME:",
    "&a [*a]",
    "*nothing",
    "&a {{a: *a}}",
    "!!binary x",
    "!!set {{a, b}}",
    "!!timestamp 2026-13-45",
    "2026-02-30",
    "1e999",
    "-1e999",
    ".nan",
    "0x",
    "0b2",
    "1_0",
    "12:30:45",
    "9" * 5000,
    "[" * 3000,
    "{{a: " * 3000,
    "- " * 3000,
    "? [a]\n: b",
    "\t",
    "\0",
    "\ufeff",
    "\u2028",
    "---\nmodels: 5",
    "...\n",
    "'",
    '"\\x',
    "|\n x",
    "%YAML 9.9",
    "<<: *x",
    "<<: [1, 2]",
    "includes: [fuzz.yaml]",
    "includes: [..]",
    "includes: [/proc/self/mem]",
    "includes: ['\\0']",
    "model_config_file: fuzz.yaml",
    "~",
    "null: null",
    "1: 2",
    "[a]: b",
    "true: x",
)


@dataclass(frozen=True)
class _Load:
    """Load a config, and plan it as `chatlearn check` does."""

    source: Any
    overrides: tuple[str, ...]
    devices: int | None
    description: str
    must_refuse: bool = False

    def load(self) -> None:
        """Everything that is known without starting a worker."""
        from chatlearn.cli.report import print_plan
        from chatlearn.config import dump_config, load_config
        from chatlearn.engine.from_config import build_engine

        config = load_config(self.source, self.overrides)
        dump_config(config)
        engine = build_engine(config)
        plan = engine.plan(config, self.devices, may_join=False)
        with contextlib.redirect_stdout(io.StringIO()):
            print_plan(engine, plan, plan.config)


class TextMaker:
    """Shipped configs whose text is damaged."""

    def __init__(self, folder: Path) -> None:
        os.environ.pop("RAY_ADDRESS", None)
        os.chdir(ROOT)
        self._marker = folder / "owned"
        self._folder = folder / "configs"
        shutil.copytree(ROOT / "configs", self._folder)
        self._texts = [path.read_text("utf-8") for path in sorted(self._folder.glob("*.yaml"))]

    def make(self, lots: random.Random) -> _Load:
        """A case by lot."""
        text = lots.choice(self._texts)
        content, how = self._damage(text, lots)
        path = self._folder / "fuzz.yaml"
        path.write_bytes(content)
        return _Load(path, (), lots.choice(_DEVICES), f"{how}: {content[:60]!r}")

    def _damage(self, text: str, lots: random.Random) -> tuple[bytes, str]:
        way = lots.randrange(6)
        if way == 0:
            return damage_bytes(text.encode(), lots)
        if way == 1:
            return _move_lines(text, lots)
        if way == 2 and lots.random() < 0.2:
            return (text + "\n" + _BOMB).encode(), "a bomb of aliases"
        fragment = lots.choice(_FRAGMENTS).format(marker=self._marker)
        spots = list(_SCALAR.finditer(text))
        if way <= 3 and spots:
            spot = lots.choice(spots)
            changed = text[: spot.start()] + fragment + text[spot.end() :]
            return changed.encode(), f"{fragment[:50]!r} as a value"
        if way == 4:
            value = yaml.safe_dump(_storable(draw_json(lots)), default_flow_style=True)
            spot = lots.choice(spots)
            changed = text[: spot.start()] + value.strip().removesuffix("...") + text[spot.end() :]
            return changed.encode("utf-8", "surrogatepass"), "a value replaced"
        at = lots.choice([0, len(text), text.find("\n", lots.randrange(len(text))) + 1])
        return (text[:at] + fragment + "\n" + text[at:]).encode(), f"{fragment[:50]!r} put in"


class ValueMaker:
    """Mappings of sections with other values and keys."""

    def __init__(self, folder: Path) -> None:
        from chatlearn.config.reading import read_model_files, read_source

        del folder
        os.environ.pop("RAY_ADDRESS", None)
        os.chdir(ROOT)
        paths = sorted((ROOT / "configs").glob("*.yaml"))
        self.contents = [read_model_files(read_source(path)) for path in paths]
        self._words = sorted({word for content in self.contents for word in _leaves(content)})

    def make(self, lots: random.Random) -> _Load:
        """A case by lot."""
        content = copy.deepcopy(lots.choice(self.contents))
        notes = [self._change(content, lots) for _ in range(lots.choice((1, 1, 2, 4)))]
        return _Load(content, (), lots.choice(_DEVICES), "; ".join(notes)[:300])

    def _change(self, content: dict[Any, Any], lots: random.Random) -> str:
        inner: Any = content
        path: list[str] = []
        while True:
            if not inner:
                inner[lots.choice(self._words)] = value = self._draw(lots)
                return f"{'.'.join(path)}: {value!r:.60} added"
            key = lots.choice(list(inner))
            path.append(str(key))
            if not (isinstance(inner[key], dict) and lots.random() < 0.85):
                break
            inner = inner[key]
        way = lots.randrange(5)
        place = ".".join(path)[:100]
        if way == 0:
            del inner[key]
            return f"{place} removed"
        if way == 1:
            inner[draw_json(lots, 3)] = inner.pop(key)
            return f"{place} renamed"
        if way == 2:
            other = lots.choice(self._words)
            inner[other] = self._draw(lots)
            return f"{other!r:.60} put beside {place}"
        inner[key] = value = self._draw(lots)
        return f"{place}: {value!r:.60}"

    def _draw(self, lots: random.Random) -> Any:
        way = lots.randrange(4)
        if way == 0:
            return lots.choice(self._words)
        return 2 ** lots.randrange(50) if way == 1 else draw_json(lots)


class OverrideMaker:
    """Shipped configs with overrides on the command line."""

    def __init__(self, folder: Path) -> None:
        self._values = ValueMaker(folder)
        self._marker = folder / "owned"
        self._paths = sorted((ROOT / "configs").glob("*.yaml"))
        self._keys = sorted({key for c in self._values.contents for key in _paths(c)})

    def make(self, lots: random.Random) -> _Load:
        """A case by lot."""
        overrides = tuple(self._draw(lots) for _ in range(lots.choice((1, 1, 3))))
        source = lots.choice(self._paths)
        text = f"{source.name} {overrides!r:.200}"
        return _Load(source, overrides, lots.choice(_DEVICES), text)

    def _draw(self, lots: random.Random) -> str:
        way = lots.randrange(5)
        key = lots.choice(self._keys)
        if way == 0:
            return damage_bytes(f"{key}=1".encode(), lots)[0].decode("latin-1")
        if way == 1:
            return f"{key}=" + lots.choice(_FRAGMENTS).format(marker=self._marker)
        if way == 2:
            return f"{key}={2 ** lots.randrange(70)}"
        return f"{key}={draw_json(lots)}"


def _move_lines(text: str, lots: random.Random) -> tuple[bytes, str]:
    lines = text.splitlines(keepends=True)
    one, other = lots.randrange(len(lines)), lots.randrange(len(lines))
    way = lots.randrange(4)
    if way == 0:
        lines.insert(other, lines[one])
    elif way == 1:
        lines[one], lines[other] = lines[other], lines[one]
    elif way == 2:
        del lines[one]
    else:
        lines[one] = " " * lots.randrange(1, 5) + lines[one]
    return "".join(lines).encode(), "lines moved"


def _storable(value: Any) -> Any:
    """What YAML can write: numbers of any length, texts without lone surrogates."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_storable(entry) for entry in cast("list[Any]", value)]
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        return {_storable(key): _storable(entry) for key, entry in entries.items()}
    return value if not isinstance(value, int) or abs(value) < 10**300 else 10**300


def _leaves(content: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for key, value in content.items():
        found.add(str(key))
        if isinstance(value, dict):
            found |= _leaves(cast("dict[str, Any]", value))
        elif isinstance(value, str):
            found.add(value)
    return found


def _paths(content: Mapping[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for key, value in content.items():
        found.add(f"{prefix}{key}")
        if isinstance(value, dict):
            found |= _paths(cast("dict[str, Any]", value), f"{prefix}{key}.")
    return found
