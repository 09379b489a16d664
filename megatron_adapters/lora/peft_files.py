"""PEFT's adapter folders: their config, and what may be in them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, cast

from chatlearn.config.schema import LoraConfig
from chatlearn.errors import CheckpointError, ConfigError
from chatlearn.parallel.sharding import TensorShard
from megatron_adapters.weights.safetensors_folder import SafetensorsFolder
from megatron_adapters.weights.safetensors_names import ADAPTER_FILE

__all__ = [
    "ADAPTER_CONFIG",
    "build_peft_config",
    "complete_lora",
    "open_adapter",
    "read_peft_config",
]

ADAPTER_CONFIG = "adapter_config.json"
_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"^base_model\.model\.model\.layers\.(\d+)\.")
# What changes what an adapter computes, and is not built here, unless it has one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "alpha_pattern": (None, {}),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None,),
    "layers_pattern": (None,),
    "layers_to_transform": (None,),
    "lora_bias": (None, False),
    "peft_type": ("LORA",),
    "rank_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_dora": (None, False),
    "use_qalora": (None, False),
}


def build_peft_config(lora: LoraConfig, base: str | None, *, is_classifier: bool) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
        lora: the config's section.
        base: name or folder of the base model.
        is_classifier: the model has the head of a value or reward model.
    """
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if is_classifier else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.use_rslora,
        "target_modules": list(lora.target_modules),
        "modules_to_save": ["score"] if is_classifier else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def read_peft_config(folder: str | Path) -> LoraConfig:
    """The section of a config that an adapter's own config means.

    Raises:
        ConfigError: no adapter there, or it has what is not built here; names file and entry.
    """
    path = Path(folder) / ADAPTER_CONFIG
    if not os.path.isfile(path):
        raise ConfigError(f"{folder} holds no {ADAPTER_CONFIG}: name a folder that peft has saved")
    try:
        values = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        for key, allowed in _NEUTRAL.items():
            if values.get(key) not in allowed:
                raise ConfigError(f"{path}: {key} is {values[key]!r}, which is not supported")
        targets = values["target_modules"]
        unknown = [name for name in targets if name not in _TARGETS]
        if isinstance(targets, str) or unknown:
            raise ConfigError(
                f"{path}: target_modules is {targets!r}; known are {', '.join(_TARGETS)}"
            )
        return LoraConfig(
            rank=values["r"],
            alpha=values["lora_alpha"],
            dropout=values.get("lora_dropout") or 0.0,
            use_rslora=bool(values.get("use_rslora")),
            target_modules=tuple(name for name in _TARGETS if name in targets),
            adapter=str(folder),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read: {error!r}") from error


def complete_lora(given: LoraConfig) -> LoraConfig:
    """A section whose `adapter` is set, with what follows from the adapter.

    Raises:
        ConfigError: an entry was set that differs.
    """
    found = read_peft_config(given.adapter or "")
    different = [
        f"{key}: got {getattr(given, key)}, the adapter has {getattr(found, key)}"
        for key in sorted(given.model_fields_set - {"adapter"})
        if getattr(given, key) != getattr(found, key)
    ]
    if different:
        raise ConfigError(f"lora differs from {given.adapter}: {'; '.join(different)}")
    return found


def open_adapter(
    folder: str | Path, shards: Sequence[TensorShard], optional: Collection[str] = ()
) -> SafetensorsFolder:
    """Open an adapter's weights, once it is sure that they are those of the model.

    Args:
        folder: in PEFT's format.
        shards: what this rank holds, in PEFT's naming.
        optional: names that may be missing.

    Raises:
        CheckpointError: the file is damaged, or tensors are missing, unknown or of another shape;
            names them.
    """
    files = SafetensorsFolder(folder, single_file=ADAPTER_FILE)
    names = frozenset(files.names)
    wanted = {shard.key: shard.global_shape for shard in shards}
    layers = {found[1] for key in wanted if (found := _LAYER.match(key)) is not None}
    problems = [f"{key} is missing" for key in sorted(wanted.keys() - names - set(optional))]
    for name in sorted(names):
        layer = _LAYER.match(name)
        if name in wanted and files.shape_of(name) != wanted[name]:
            problems.append(f"{name} has the shape {files.shape_of(name)}, expected {wanted[name]}")
        elif name not in wanted and name not in optional and (not layer or layer[1] in layers):
            problems.append(f"{name} belongs to no part of the model")
    if problems:
        files.close()
        lines = "\n  ".join(problems[:10])
        raise CheckpointError(f"{Path(folder) / ADAPTER_FILE} is of another model:\n  {lines}")
    return files
