"""The record that lies beside a Megatron checkpoint and says what model it is of. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.config.field_kinds import find_bad_sizes, find_wrong_kinds
from chatlearn.config.megatron_fields import MEGATRON_FIELDS
from chatlearn.config.model_fields import MODEL_FIELDS
from chatlearn.errors import CheckpointError, in_one_line
from megatron_adapters.weights.architecture import Head

if TYPE_CHECKING:
    from chatlearn.config import ModelConfig

__all__ = ["MODEL_FILE", "ModelRecord", "read_model_file", "record_of", "write_model_file"]

MODEL_FILE = "model.json"
# How a model is cut does not belong to it.
_LAYOUT = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "sequence_parallel",
)
_TRAINING = ("lr_", "recompute_")


@dataclass(frozen=True)
class ModelRecord:
    """What a checkpoint is of.

    Attributes:
        fields: the flat Megatron fields of the model, without those of layout and training.
        head: `lm` or `scalar`.
        family: of Hugging Face folders; None: not said.
        pretrained: the folder that the model started from; None: there was none.
        lora: the config's section of adapters in the checkpoint; None: it holds none.
    """

    fields: Mapping[str, Any]
    head: Head
    family: str | None = None
    pretrained: str | None = None
    lora: Mapping[str, Any] | None = None


def record_of(head: Head, args: ModelConfig, fields: Mapping[str, Any]) -> ModelRecord:
    """The record of a live model.

    Args:
        head: of the model.
        args: the model's section of the config.
        fields: its flat Megatron fields.
    """
    return ModelRecord(
        fields,
        head,
        args.family,
        None if args.pretrained is None else str(Path(args.pretrained).resolve()),
        None if args.lora is None else args.lora.model_dump(mode="json"),
    )


def write_model_file(folder: Path, record: ModelRecord) -> None:
    """Write the record into a checkpoint's folder.

    Raises:
        CheckpointError: it cannot be written.
    """
    known = {*MODEL_FIELDS, *MEGATRON_FIELDS["TransformerConfig"], *_latent_fields()}
    fields = {
        key: value
        for key, value in record.fields.items()
        if key in known and key not in _LAYOUT and not key.startswith(_TRAINING)
    }
    content = {**asdict(record), "fields": fields}
    try:
        text = json.dumps(content, indent=1)
        (folder / MODEL_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder / MODEL_FILE} cannot be written: {error}") from error


def read_model_file(folder: Path) -> ModelRecord:
    """Read the record of a checkpoint.

    Raises:
        CheckpointError: it is not there, or not what `write_model_file` writes.
    """
    path = folder / MODEL_FILE
    try:
        content = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        return _checked(ModelRecord(**content))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is not there, so what model the checkpoint is of is not known: write it by "
            'hand ({"fields": {...}, "head": "lm"}), or give --like DIR'
        ) from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {in_one_line(error)}") from error


def _checked(record: ModelRecord) -> ModelRecord:
    """The record, if its entries are what they should be."""
    for name in ("family", "pretrained"):
        value = getattr(record, name)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name}: expected a text, got {value!r:.60}")
    for name in ("fields", "lora"):
        value = getattr(record, name)
        if not isinstance(value, dict) and (name == "fields" or value is not None):
            raise TypeError(f"{name}: expected an object, got {value!r:.60}")
    if record.head not in ("lm", "scalar"):
        raise ValueError(f"head: expected lm or scalar, got {record.head!r:.60}")
    problems = [*find_wrong_kinds(record.fields)] or [*find_bad_sizes(record.fields)]
    if problems:
        raise ValueError("; ".join(problems[:3]))
    return record


def _latent_fields() -> tuple[str, ...]:
    return tuple(MEGATRON_FIELDS.get("MLATransformerConfig", {}))
