"""The families of models that are loaded from and written to Hugging Face folders. Pure.

A family is a table of names (`naming`), and what its config.json means in Megatron's fields. Both
directions are held equal by tests/unit/megatron_adapters/test_megatron_weights_families.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chatlearn.config.field_kinds import find_bad_sizes, find_wrong_kinds
from chatlearn.errors import ConfigError
from megatron_adapters.weights.config_file import ModelConfigFile, describing_model
from megatron_adapters.weights.dense_families import (
    read_gemma3,
    read_llama,
    read_mistral,
    read_qwen2,
    read_qwen3,
    write_gemma3,
    write_llama,
    write_mistral,
    write_qwen2,
    write_qwen3,
)
from megatron_adapters.weights.expert_families import (
    read_deepseek,
    read_mixtral,
    read_qwen3_moe,
    write_deepseek,
    write_mixtral,
    write_qwen3_moe,
)
from megatron_adapters.weights.naming import NAMINGS, Naming, in_files

__all__ = ["FAMILIES", "Family", "find_family"]

Fields = dict[str, Any]
_LLAMA3_BASE = 500000.0
# Entries of every family's config.json, and the fields that they are.
_COMMON = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "layernorm_epsilon",
    "initializer_range": "init_method_std",
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        name: ours.
        model_type: transformers'.
        stem: of its classes: `Llama` for `LlamaForCausalLM`.
        naming: names of its files.
        read: what its config.json says beyond what all families share, as fields.
        write: the reverse.
        classifier: of its sequence classification class.
    """

    name: str
    model_type: str
    stem: str
    naming: Naming
    read: Callable[[ModelConfigFile], Fields]
    write: Callable[[Mapping[str, Any]], Fields]
    classifier: str | None = None

    def architecture(self, head: str) -> str:
        """Transformers' class for a head, `lm` or `scalar`."""
        if head == "lm":
            return f"{self.stem}ForCausalLM"
        return f"{self.classifier or self.stem}ForSequenceClassification"

    def read_fields(self, config: ModelConfigFile) -> Fields:
        """Megatron's flat fields of the model that a config.json describes.

        Raises:
            ConfigError: it describes what is not built here; names the file and the entry.
        """
        with describing_model(config.path):
            fields = self._read_fields(config)
        problems = [*find_wrong_kinds(fields)] or [*find_bad_sizes(fields)]
        if problems:
            raise ConfigError(f"{config.path} describes no model: {'; '.join(problems[:3])}")
        return fields

    def _read_fields(self, config: ModelConfigFile) -> Fields:
        _refuse_unknown(config)
        fields: Fields = {
            field: config.need(key) for key, field in _COMMON.items() if key in config.values
        }
        for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
            config.need(key)
        fields["swiglu"] = True
        fields["untie_embeddings_and_output_weights"] = not config.get("tie_word_embeddings", False)
        fields.update(self.read(config))
        return fields

    def write_config(self, fields: Mapping[str, Any], head: str, dtype: str) -> dict[str, Any]:
        """The config.json of a model of this family; `read_fields` gives its fields back.

        Args:
            fields: the flat Megatron fields.
            head: `lm` or `scalar`.
            dtype: of the weights.
        """
        found: dict[str, Any] = {
            "architectures": [self.architecture(head)],
            "model_type": self.model_type,
            "dtype": dtype,
            "tie_word_embeddings": not fields.get("untie_embeddings_and_output_weights", True),
            "use_cache": True,
        }
        if head == "scalar":
            found["id2label"], found["label2id"] = {"0": "LABEL_0"}, {"LABEL_0": 0}
        found |= {key: fields[field] for key, field in _COMMON.items() if field in fields}
        found.setdefault("intermediate_size", 4 * fields["hidden_size"])
        found.setdefault("rms_norm_eps", 1e-5)
        return {**found, **self.write(fields)}


def find_family(config: ModelConfigFile) -> Family:
    """The family of a config.json.

    Raises:
        ConfigError: its architecture is not known; names the file and the known ones.
    """
    kind = config.model_type
    known = [family for family in FAMILIES.values() if family.model_type == kind]
    if not known:
        types = ", ".join(dict.fromkeys(family.model_type for family in FAMILIES.values()))
        raise ConfigError(
            f"{config.path}: model_type {kind!r} ({config.architecture or 'no architecture'}) is "
            f"not supported; known are {types}"
        )
    if kind != "llama":
        return known[0]
    rope = config.read_rope()
    is_third = rope.scaling is not None or rope.base >= _LLAMA3_BASE
    return FAMILIES["llama3" if is_third else "llama2"]


def _refuse_unknown(config: ModelConfigFile) -> None:
    config.refuse_unless("quantization_config")
    config.refuse_unless("hidden_act", "silu", "gelu_pytorch_tanh")
    config.refuse_unless("pretraining_tp", 1)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        config.refuse_unless(key)
    config.refuse_unless("use_bidirectional_attention", False)


_LLAMA_FILES = in_files(NAMINGS["llama"])
FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        Family("llama2", "llama", "Llama", _LLAMA_FILES, read_llama, write_llama),
        Family("llama3", "llama", "Llama", _LLAMA_FILES, read_llama, write_llama),
        Family("qwen2", "qwen2", "Qwen2", _LLAMA_FILES, read_qwen2, write_qwen2),
        Family("qwen3", "qwen3", "Qwen3", _LLAMA_FILES, read_qwen3, write_qwen3),
        Family("qwen3_moe", "qwen3_moe", "Qwen3Moe", _LLAMA_FILES, read_qwen3_moe, write_qwen3_moe),
        Family("mistral", "mistral", "Mistral", _LLAMA_FILES, read_mistral, write_mistral),
        Family(
            "mixtral",
            "mixtral",
            "Mixtral",
            in_files(NAMINGS["llama"], is_mixtral=True),
            read_mixtral,
            write_mixtral,
        ),
        Family(
            "gemma3",
            "gemma3_text",
            "Gemma3",
            in_files(NAMINGS["gemma"]),
            read_gemma3,
            write_gemma3,
            classifier="Gemma3Text",
        ),
        Family(
            "deepseek_v3",
            "deepseek_v3",
            "DeepseekV3",
            in_files(NAMINGS["deepseek"]),
            read_deepseek,
            write_deepseek,
        ),
    )
}
