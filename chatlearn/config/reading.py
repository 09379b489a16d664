"""Reads YAML: includes, environment variables, overrides, per-model files. Data only, no code."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import yaml

from chatlearn.errors import ConfigError

__all__ = ["apply_overrides", "as_section", "merge", "read_model_files", "read_source"]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^}]*))?\}")
_MODEL_FILE = "model_config_file"
_ENVIRONMENT = "runtime_env.env_vars."
_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


_KINDS = ("bool", "float", "int", "map", "null", "seq", "str")
# Aliases repeat what they name: a few lines can stand for more than any memory holds.
_MOST_ENTRIES = 100_000
_MOST_CHARS = 10_000_000
_DEEPEST = 60


class _Loader(yaml.SafeLoader):
    """The safe loader with JSON's kinds of values only; a date stays a text.

    It refuses doubled keys and reads 1e-5 as a number.
    """

    yaml_constructors: ClassVar[dict[Any, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        tag: build
        for tag, build in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in _KINDS
    }
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {  # pyright: ignore[reportIncompatibleVariableOverride]
        start: [entry for entry in found if not entry[0].endswith(":timestamp")]
        for start, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def _build_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key = cast("Any", loader).construct_object(key_node, deep=True)
        mark = key_node.start_mark
        if not isinstance(key, Hashable):
            raise ConfigError(f"{mark.name}:{mark.line + 1}: the key {key!r} is no plain value")
        if key in keys:
            raise ConfigError(f"{mark.name}:{mark.line + 1}: the key {key!r} occurs twice")
        keys.add(key)
    # Only now: a key that overrides one merged in by `<<` is not doubled.
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _build_mapping)
_Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
    "tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")
)


def read_source(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The raw content of a config: a mapping as it is, or a file with its includes.

    `model_config_file` is read later, by `read_model_files`; here its path becomes relative to
    the working directory.

    Raises:
        ConfigError: neither of these, missing file, bad YAML, an include cycle, an unset variable.
    """
    if isinstance(source, Mapping):
        return cast("dict[str, Any]", _expand(_plain(source), ""))
    if not isinstance(source, str | Path):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(
            f"the config is a {type(source).__name__}; expected the path of a YAML file or a "
            "mapping of sections"
        )
    return _read_file(Path(source), ())


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`key.path=value` entries put into the content; values are YAML scalars or flow lists.

    Raises:
        ConfigError: an entry without `=`, or a path through something that is no section.
    """
    for entry in overrides:
        path, separator, text = entry.partition("=")
        if not separator or not all(path.split(".")):
            raise ConfigError(f"override {entry!r}: expected key.path=value")
        nested: Any = _parse(text, f"override {path}")
        for key in reversed(path.split(".")):
            nested = {key: nested}
        content = merge(content, nested)
    return content


def read_model_files(content: dict[str, Any]) -> dict[str, Any]:
    """The content with each model's `model_config_file` merged beneath its own keys.

    The key itself is gone afterwards, so that the resolved config stands alone.

    Raises:
        ConfigError: a file that cannot be read, or that names another model file.
    """
    models = content.get("models")
    if not isinstance(models, Mapping):
        return content
    merged: dict[str, Any] = {}
    for name, section in cast("Mapping[str, Any]", models).items():
        merged[name] = section
        own = dict(as_section(section))
        path = own.get(_MODEL_FILE)
        if isinstance(path, str):
            del own[_MODEL_FILE]
            beneath = _read_file(Path(path), ())
            if _MODEL_FILE in beneath:
                raise ConfigError(f"{path}: {_MODEL_FILE} within a model file: use includes")
            merged[name] = merge(beneath, own)
    return {**content, "models": merged}


def as_section(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, section by section."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(cast("Mapping[str, Any]", below), cast("Mapping[str, Any]", value))
        else:
            merged[key] = value
    return merged


def _read_file(path: Path, within: tuple[Path, ...]) -> dict[str, Any]:
    try:
        resolved = path.resolve()
        if resolved in within:
            chain = " -> ".join(str(each) for each in (*within, resolved))
            raise ConfigError(f"includes close a cycle: {chain}")
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARS + 1)
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 text: {error.reason}") from error
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be: {error}") from error
    if len(text) > _MOST_CHARS:
        raise ConfigError(f"config file {path} is longer than {_MOST_CHARS} characters")
    content = _parse(text, str(path))
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, got {type(content).__name__}")
    own = cast("dict[str, Any]", _expand(content, ""))
    _anchor_model_files(own, path.parent)
    included = own.pop("includes", [])
    if not isinstance(included, list):
        raise ConfigError(f"{path}: includes: expected a list of files")
    merged: dict[str, Any] = {}
    for name in cast("list[Any]", included):
        merged = merge(merged, _read_file(path.parent / str(name), (*within, resolved)))
    return merge(merged, own)


def _anchor_model_files(content: dict[str, Any], folder: Path) -> None:
    """Make the paths of `model_config_file` relative to the folder of the file that has them."""
    for section in as_section(content.get("models")).values():
        path = as_section(section).get(_MODEL_FILE)
        if isinstance(path, str):
            section[_MODEL_FILE] = str(folder / path)


def _parse(text: str, name: str) -> Any:
    loader: Any = None
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_entries(node, {}, 0) > _MOST_ENTRIES:
            raise ConfigError(f"{name}: more than {_MOST_ENTRIES} entries, aliases written out")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark is not None else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        # Without its cause, which shows the text around: there may be a secret in it.
        raise ConfigError(f"{where}: not valid YAML: {problem}") from None
    except ValueError as error:
        raise ConfigError(f"{name}: a number cannot be read: {error}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def _count_entries(node: Any, known: dict[int, int], depth: int) -> int:
    """Entries of a node, aliases written out.

    Args:
        node: of YAML's tree, in which aliases are the same node again.
        known: counts of the nodes that were seen; 0 while a node is being counted.
        depth: of the node.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if known.get(id(node)) == 0:
        mark = node.start_mark
        raise ConfigError(f"{mark.name}:{mark.line + 1}: an alias stands within what it names")
    if depth > _DEEPEST:
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = 0
        parts = node.value
        if isinstance(node, yaml.MappingNode):
            parts = [each for pair in node.value for each in pair]
        known[id(node)] = 1 + sum(_count_entries(part, known, depth + 1) for part in parts)
    return known[id(node)]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in cast("Mapping[Any, Any]", value).items()}
    return value


def _expand(value: Any, path: str) -> Any:
    """Replace `${NAME:default}` in texts; a whole-text variable is read as YAML."""
    if isinstance(value, dict):
        entries = cast("dict[Any, Any]", value)
        return {key: _expand(entry, f"{path}.{key}".strip(".")) for key, entry in entries.items()}
    if isinstance(value, list):
        return [_expand(entry, path) for entry in cast("list[Any]", value)]
    if not isinstance(value, str) or "${" not in value:
        return value
    text = _VARIABLE.sub(lambda match: _variable(match, path), value)
    # A number-like secret must not become a number on its way to the workers.
    is_text = path.startswith(_ENVIRONMENT)
    return _parse(text, path) if _VARIABLE.fullmatch(value) and not is_text else text


def _variable(match: re.Match[str], path: str) -> str:
    name, default = match[1], cast("str | None", match[2])
    found = os.environ.get(name, default)
    if found is None:
        raise ConfigError(
            f"{path}: the environment variable {name} is not set; set it, or give a default: "
            f"${{{name}:value}}"
        )
    return found
