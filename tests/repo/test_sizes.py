"""Files, functions and classes stay small; packages and modules say what they are."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("chatlearn", "megatron_adapters")
FILES = sorted(
    path for folder in (*PACKAGES, "scripts", "tests") for path in (ROOT / folder).rglob("*.py")
)
LIBRARY = [path for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES]

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80
MAX_METHODS = 15
MAX_TUPLE = 2
# Torch says what these return: one gradient for each argument of `forward`.
FOREIGN_NAMES = {"backward"}
# The classes that users know by these names, with the methods that they know.
KNOWN_CLASSES = {"BaseModule", "Engine", "Environment", "Trainer", "Evaluator"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def _named_methods(node):
    """Methods of a class, those that Python itself calls (`__init__`, ...) left out."""
    names = {member.name for member in node.body if isinstance(member, FUNCTIONS)}
    return {name for name in names if not (name.startswith("__") and name.endswith("__"))}


def test_no_file_has_more_than_500_lines():
    lengths = {str(p.relative_to(ROOT)): len(p.read_text("utf-8").splitlines()) for p in FILES}
    assert {name: size for name, size in lengths.items() if size > MAX_FILE_LINES} == {}


def test_no_function_has_more_than_80_lines():
    too_long = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in FILES
        for node in ast.walk(_tree(path))
        if isinstance(node, FUNCTIONS)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_no_class_has_more_than_15_methods():
    too_wide = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in FILES
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.ClassDef)
        and node.name not in KNOWN_CLASSES
        and len(_named_methods(node)) > MAX_METHODS
    ]
    assert too_wide == []


def _is_wide_tuple(node):
    return (
        isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "tuple"
        and isinstance(node.slice, ast.Tuple)
        and len(node.slice.elts) > MAX_TUPLE
    )


def test_no_function_returns_a_tuple_of_more_than_two():
    """A frozen dataclass says what its parts are."""
    wide = [
        f"{path.relative_to(ROOT)}: {node.name}"
        for path in LIBRARY
        for node in ast.walk(_tree(path))
        if isinstance(node, FUNCTIONS)
        and node.name not in FOREIGN_NAMES
        and node.returns is not None
        and any(map(_is_wide_tuple, ast.walk(node.returns)))
    ]
    assert wide == []


def test_no_module_is_named_after_nothing():
    vague = [
        str(path.relative_to(ROOT))
        for path in FILES
        if VAGUE_NAMES & {path.stem, *path.relative_to(ROOT).parts}
    ]
    assert vague == []


def test_every_module_with_content_says_what_is_public():
    silent = []
    for path in LIBRARY:
        body = _tree(path).body[1:]  # the first entry is the docstring
        targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
        if body and "__all__" not in [t.id for t in targets if isinstance(t, ast.Name)]:
            silent.append(str(path.relative_to(ROOT)))
    assert silent == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_ships_its_types(package):
    assert (ROOT / package / "py.typed").is_file()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_of_a_package_says_what_it_is(package):
    folders = {path.parent for path in LIBRARY if path.relative_to(ROOT).parts[0] == package}
    undescribed = [
        str(folder.relative_to(ROOT))
        for folder in folders
        if not (folder / "__init__.py").is_file()
        or not ast.get_docstring(_tree(folder / "__init__.py"))
    ]
    assert undescribed == []
