"""What README.md and docs/ name exists, and the programs that they show run."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from chatlearn.config.megatron_fields import MEGATRON_FIELDS
from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.config.schema import ModelConfig, RuntimeConfig

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGE_NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
RUNNABLE = re.compile(r"^<!-- runnable -->\n```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"(?<![\w/.<{}-])((?:[\w.-]+/)+[\w.-]+\.(?:py|sh|yaml|md|toml))\b")
FOLDER = re.compile(r"^((?:chatlearn|megatron_adapters|scripts|tests|configs|docs)/(?:[\w.-]+/)*)$")
COMMAND = re.compile(r"^\$? ?(?:[A-Z_]+=\S+ )*(make|chatlearn) ([a-z][a-z_-]*)\b", re.MULTILINE)
DOTTED = re.compile(r"^((?:chatlearn|megatron_adapters)(?:\.\w+)+)(?:\(.*\))?$")
KEY = re.compile(r"^(?:runtime|models\.<?\w+>?)(?:\.\w+)+(?=$|:)")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")


def _inline(text):
    return INLINE.findall(FENCE.sub("", text))


def _shell(text):
    """Inline code and the blocks that a person types into a shell."""
    blocks = [body for kind, body in FENCE.findall(text) if kind in ("", "bash", "sh", "console")]
    return [*_inline(text), *blocks]


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_named_file_exists(name):
    found = {
        path for code in _shell((ROOT / name).read_text("utf-8")) for path in FILE.findall(code)
    }
    found |= {
        path for code in _inline((ROOT / name).read_text("utf-8")) for path in FOLDER.findall(code)
    }
    assert [path for path in sorted(found) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_link_leads_somewhere(name):
    page = ROOT / name
    links = LINK.findall(FENCE.sub("", page.read_text("utf-8")))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_named_command_exists(name):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    help_text = _run([sys.executable, "-m", "chatlearn.cli.main", "--help"], ROOT)
    commands = re.findall(r"^    (\w+) ", help_text, re.MULTILINE)
    known = {"make": set(targets), "chatlearn": set(commands)}
    found = {c for code in _shell((ROOT / name).read_text("utf-8")) for c in COMMAND.findall(code)}
    assert {(tool, command) for tool, command in found if command not in known[tool]} == set()


@pytest.mark.parametrize("name", PAGE_NAMES)
def test_every_dotted_name_exists(name):
    codes = _inline((ROOT / name).read_text("utf-8"))
    dotted = {match[1] for code in codes if (match := DOTTED.match(code))}
    assert [path for path in sorted(dotted) if not _is_there(path)] == []


@pytest.mark.parametrize("name", [n for n in PAGE_NAMES if n != "docs/configuration.md"])
def test_every_configuration_key_exists(name):
    codes = _inline((ROOT / name).read_text("utf-8"))
    keys = {match[0] for code in codes if (match := KEY.match(code))}
    assert [key for key in sorted(keys) if not _is_key(key)] == []


def _program(name, folder):
    """The blocks of one page that are marked as runnable: together they are one program."""
    program = folder / "program.py"
    (folder / "configs").symlink_to(ROOT / "configs")
    program.write_text("\n".join(RUNNABLE.findall((ROOT / name).read_text("utf-8"))), "utf-8")
    return [sys.executable, str(program)]


@pytest.mark.parametrize(
    ("name", "last_words"),
    [
        ("README.md", r"mean length at the end: [1-6]\."),
        ("docs/flows.md", r"right answers: 1\.0\n"),
        ("docs/adding-a-model.md", r"\[9, 2, 6, 5\] -> \[\d+"),
        ("docs/adding-an-algorithm.md", r"reward: 0\.\d+ -> 0\.[89]"),
    ],
)
def test_the_program_of_a_page_does_what_it_says(name, last_words, tmp_path):
    assert re.search(last_words, _run(_program(name, tmp_path), tmp_path))


def test_every_page_with_a_program_is_tried():
    pages = [name for name in PAGE_NAMES if RUNNABLE.search((ROOT / name).read_text("utf-8"))]
    assert pages == [
        "README.md",
        "docs/adding-a-model.md",
        "docs/adding-an-algorithm.md",
        "docs/flows.md",
    ]


def _run(command, folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _is_there(path):
    """Whether a dotted name is a module, or leads to one and on by attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[length:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def _is_key(key):
    """Whether a dotted key is in the schema, or a flat field of a Megatron model."""
    section, *parts = key.split(".")
    kind = RuntimeConfig if section == "runtime" else ModelConfig
    if section == "models":
        parts = parts[1:]
    for part in parts:
        fields = getattr(kind, "model_fields", {})
        if part not in fields:
            flat = {*MODEL_FIELDS}.union(*MEGATRON_FIELDS.values())
            return kind is ModelConfig and part in flat
        kind = fields[part].annotation
    return bool(parts)
