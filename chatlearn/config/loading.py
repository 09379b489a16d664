"""From raw content to the typed configuration, with every problem named at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import ValidationError

from chatlearn.config.chatlearn_keys import UNSUPPORTED, rename_runtime_keys
from chatlearn.config.checks import find_contradictions
from chatlearn.config.field_kinds import FIELD_KINDS, describe_wrong_kind, is_kind
from chatlearn.config.guards import GuardsConfig
from chatlearn.config.megatron_fields import MEGATRON_FIELDS
from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.config.reading import (
    apply_overrides,
    as_section,
    merge,
    read_model_files,
    read_source,
)
from chatlearn.config.schema import (
    AlgorithmConfig,
    Config,
    GenerationConfig,
    ModelConfig,
    RuntimeConfig,
    RuntimeEnvConfig,
)
from chatlearn.config.secrets import find_secrets, hide_in_config, hide_secrets
from chatlearn.errors import ConfigError

__all__ = ["dump_config", "load_config"]

# Of a message's line, characters.
_LONGEST = 800


def load_config(
    source: str | Path | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Read, complete and check a configuration.

    Args:
        source: a YAML file or its content; None: `$CHATLEARN_CONFIG`, else nothing but defaults.
        overrides: `key.path=value` entries.

    Raises:
        ConfigError: lists everything that is wrong, a line each.
    """
    content: dict[str, Any] = {}
    try:
        if source is None:
            source = os.environ.get("CHATLEARN_CONFIG") or {}
        content = read_model_files(apply_overrides(read_source(source), overrides))
        return _build(content, "the config" if isinstance(source, Mapping) else str(source))
    except ConfigError as error:
        raise ConfigError(_presentable(str(error), find_secrets(content))) from error.__cause__


def _build(content: dict[str, Any], name: str) -> Config:
    problems: list[str] = []
    # A section whose keys are all commented out reads as null.
    empty: dict[str, Any] = {}
    content = {key: empty if value is None else value for key, value in content.items()}
    content = _sort_model_fields(content, problems)
    if isinstance(content.get("runtime"), Mapping):
        content["runtime"] = dict(content["runtime"])
        rename_runtime_keys(content["runtime"], problems)
    _find_unknown(content, problems)
    config = None
    if not problems:
        try:
            config = Config.model_validate(content)
        except ValidationError as error:
            problems.extend(_describe(error))
    if config is not None:
        problems.extend(find_contradictions(config))
    if problems or config is None:
        raise ConfigError("\n  ".join([f"{name} cannot be used:", *problems]))
    return config


def _presentable(message: str, secrets: Mapping[str, str]) -> str:
    """A message without secrets, whose lines have a bounded length."""
    lines = hide_secrets(message, secrets).splitlines()
    return "\n".join(
        line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 4 :]}"
        for line in lines
    )


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one.

    Secrets are written as `${NAME}`: the environment must have them when it is read.
    """
    content = config.model_dump(mode="json")
    for section in content["models"].values():
        section.update(section.pop("megatron"))
    return yaml.safe_dump(hide_in_config(content), sort_keys=False)


def _sort_model_fields(content: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Move Megatron's flat fields below `megatron`, checking their kinds."""
    models = content.get("models")
    if not isinstance(models, Mapping):
        return content
    sorted_models: dict[str, Any] = {}
    for model, section in cast("Mapping[str, Any]", models).items():
        if not isinstance(section, Mapping):
            sorted_models[model] = section if section is not None else {}
            continue
        own, megatron = dict[str, Any](), dict[str, Any]()
        for key, value in cast("Mapping[str, Any]", section).items():
            if key in ModelConfig.model_fields or key not in FIELD_KINDS:
                own[key] = value
                continue
            megatron[key] = value
            if not is_kind(value, FIELD_KINDS[key]):
                where = f"models.{model}.{key}"
                problems.append(describe_wrong_kind(where, value, FIELD_KINDS[key]))
        if "num_device" in own:
            _rename_num_device(model, own, problems)
        if megatron:
            own["megatron"] = merge(cast("dict[str, Any]", own.get("megatron") or {}), megatron)
        sorted_models[model] = own
    return {**content, "models": sorted_models}


def _rename_num_device(model: str, own: dict[str, Any], problems: list[str]) -> None:
    count = own.pop("num_device")
    if own.setdefault("num_gpu", count) != count:
        problems.append(
            f"models.{model}: num_device is the old name of num_gpu, and they differ: "
            f"{count} and {own['num_gpu']}; keep num_gpu"
        )


def _find_unknown(content: Mapping[str, Any], problems: list[str]) -> None:
    _check_keys(content, "", tuple(Config.model_fields), "", problems)
    flat = {name for group in MEGATRON_FIELDS.values() for name in group} | set(MODEL_FIELDS)
    own = tuple(key for key in ModelConfig.model_fields if key != "megatron")
    for name, section in as_section(content.get("models")).items():
        path = f"models.{name}"
        _check_keys(section, path, (*own, "megatron", *flat), "models", problems)
        generation, megatron = map(as_section(section).get, ("generation", "megatron"))
        names = tuple(GenerationConfig.model_fields)
        _check_keys(generation, f"{path}.generation", names, None, problems)
        _check_keys(megatron, f"{path}.megatron", tuple(flat), None, problems)
    runtime = content.get("runtime")
    _check_keys(runtime, "runtime", tuple(RuntimeConfig.model_fields), "runtime", problems)
    names = tuple(AlgorithmConfig.model_fields)
    algorithm = as_section(runtime).get("algorithm")
    _check_keys(algorithm, "runtime.algorithm", names, None, problems)
    names = tuple(GuardsConfig.model_fields)
    _check_keys(as_section(runtime).get("guards"), "runtime.guards", names, None, problems)
    names = tuple(RuntimeEnvConfig.model_fields)
    _check_keys(content.get("runtime_env"), "runtime_env", names, "runtime_env", problems)


def _check_keys(
    section: Any, path: str, known: Sequence[str], table: str | None, problems: list[str]
) -> None:
    unsupported = UNSUPPORTED.get(table, {}) if table is not None else {}
    for key in as_section(section):
        if key in known:
            continue
        where = f"{path}.{key}".lstrip(".")
        if key in unsupported:
            problems.append(f"{where}: known from ChatLearn but unsupported: {unsupported[key]}")
            continue
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known[:12])}"
        problems.append(f"{where}: unknown key; {hint}")


def _describe(error: ValidationError) -> list[str]:
    lines: list[str] = []
    for problem in error.errors():
        path = ".".join(part for part in map(str, problem["loc"]) if not _names_a_type(part))
        value = problem["input"]
        shown = f"got {value!r} ({type(value).__name__})"
        message = problem["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
        lines.append(f"{path}: {shown}, expected {message}")
    return lines


def _names_a_type(part: str) -> bool:
    """Whether a part of pydantic's location is one arm of a union, not a key."""
    return part.startswith(("function-", "constrained-", "literal["))
