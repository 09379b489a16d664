"""Reading `config.json` of a Hugging Face folder, as transformers 4 and 5 write it. Pure."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chatlearn.errors import ConfigError, in_one_line

__all__ = ["CONFIG_FILE", "ModelConfigFile", "Rope", "describing_model", "read_config_file"]

CONFIG_FILE = "config.json"


@contextmanager
def describing_model(path: Path) -> Generator[None]:
    """Turn what entries of a strange kind lead to into an error that names the file.

    Raises:
        ConfigError: in the place of a TypeError, a KeyError and their like.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} describes no model: {in_one_line(error)}") from error


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer.

    Attributes:
        base: of the frequencies.
        scaling: `rope_type` and what belongs to it; None: no scaling.
        percent: share of a head that is rotated.
    """

    base: float
    scaling: Mapping[str, Any] | None
    percent: float


@dataclass(frozen=True)
class ModelConfigFile:
    """The content of a config.json, with errors that name the file.

    Attributes:
        path: of the file.
        values: its entries.
    """

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        """An entry; `default` where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def need(self, key: str) -> Any:
        """An entry that must be there.

        Raises:
            ConfigError: it is missing or null.
        """
        value = self.values.get(key)
        if value is None:
            raise ConfigError(f"{self.path}: {key} is missing: the file does not describe a model")
        return value

    def refuse_unless(self, key: str, *allowed: Any) -> None:
        """Refuse a value that changes what the model computes in a way that is not built here.

        A missing entry and null count as allowed.

        Raises:
            ConfigError: names the file, the value and what is allowed.
        """
        value = self.values.get(key)
        if value is not None and value not in allowed:
            wanted = " or ".join(json.dumps(entry) for entry in allowed) or "null"
            raise ConfigError(
                f"{self.path}: {key} is {json.dumps(value)}, expected {wanted}: such a model is "
                "not supported"
            )

    @property
    def model_type(self) -> str:
        """Transformers' name of the architecture."""
        return str(self.need("model_type"))

    @property
    def architecture(self) -> str | None:
        """The class that the weights are of, such as `LlamaForCausalLM`."""
        names = self.get("architectures", [])
        with describing_model(self.path):
            return str(names[0]) if names else None

    @property
    def dtype(self) -> str | None:
        """Of the weights, torch's name."""
        name = self.get("dtype", self.get("torch_dtype"))
        return None if name is None else str(name)

    @property
    def num_labels(self) -> int:
        """Outputs of a sequence classifier."""
        labels = self.get("id2label")
        with describing_model(self.path):
            return len(labels) if labels is not None else int(self.get("num_labels", 2))

    def read_rope(self, kind: str | None = None) -> Rope:
        """The rotary positions, from `rope_parameters` or from `rope_theta` and `rope_scaling`.

        Args:
            kind: of the layers, for families whose layers differ, such as `full_attention`.
        """
        with describing_model(self.path):
            return self._read_rope(kind)

    def _read_rope(self, kind: str | None) -> Rope:
        parameters: dict[str, Any] = dict(self.get("rope_parameters", {}))
        if kind is not None and kind in parameters:
            parameters = dict(parameters[kind] or {})
        parameters = {**dict(self.get("rope_scaling", {})), **parameters}
        base = parameters.pop("rope_theta", self.get("rope_theta", 10000.0))
        percent = parameters.pop("partial_rotary_factor", self.get("partial_rotary_factor", 1.0))
        name = str(parameters.pop("rope_type", parameters.pop("type", "default")))
        parameters.pop("type", None)
        scaling = None if name == "default" else {"rope_type": name, **parameters}
        return Rope(float(base), scaling, float(percent))


def read_config_file(folder: str | Path) -> ModelConfigFile:
    """Read a folder's config.json.

    Raises:
        ConfigError: there is no such file, or it holds no JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    if not os.path.isfile(path):
        raise ConfigError(
            f"{folder} holds no {CONFIG_FILE}: name a folder in Hugging Face's format, as "
            "transformers' save_pretrained writes it"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {in_one_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return ModelConfigFile(path, cast("dict[str, Any]", values))
