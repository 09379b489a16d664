"""Folders whose JSON is damaged, or names files elsewhere, are refused in a line."""

import json

import pytest

from chatlearn.checkpoint.manifest import MANIFEST_FILE, _sum_list, verify_checkpoint
from chatlearn.errors import ChatLearnError, CheckpointError
from megatron_adapters.weights.config_file import read_config_file
from megatron_adapters.weights.families import find_family
from megatron_adapters.weights.model_file import read_model_file
from megatron_adapters.weights.safetensors_folder import SafetensorsFolder

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "vocab_size": 31,
    "max_position_embeddings": 64,
}


def refusal(load, *arguments):
    with pytest.raises(ChatLearnError) as caught:
        load(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def read_fields(folder):
    config = read_config_file(folder)
    return find_family(config).read_fields(config)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "names files outside the folder: ../model.safetensors"),
        ({"a": "/etc/passwd"}, "names files outside the folder: /etc/passwd"),
        ({"a": 5}, "is no index of safetensors files: TypeError"),
        ({"a": "e" * 300}, "is damaged or no safetensors file"),
        ({"a": "x\0"}, "is missing"),
        ([], "is no index of safetensors files: AttributeError"),
    ],
)
def test_an_index_names_files_of_its_folder_only(tmp_path, weight_map, message):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert message in refusal(SafetensorsFolder, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": {}}, "num_layers: got {} (dict), expected int"),
        ({"num_hidden_layers": 10**9}, "num_layers: got 1000000000, expected 10000 or less"),
        ({"vocab_size": "*"}, "vocab_size: got '*' (str), expected int"),
        ({"rope_theta": "fast"}, "describes no model: ValueError"),
        ({"rope_parameters": 5}, "describes no model: TypeError"),
        ({"hidden_size": float("nan")}, "describes no model: ValueError: cannot convert float NaN"),
    ],
)
def test_a_config_with_entries_of_another_kind_describes_no_model(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_fields(tmp_path)["num_layers"] == 2
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    assert message in refusal(read_fields, tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "\udcff", "5"])
def test_files_that_are_no_json_object_are_refused(tmp_path, text):
    for name in ("config.json", "model.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    for load in (read_config_file, read_model_file, SafetensorsFolder):
        refusal(load, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"head": "tail"}, {"fields": []}, {"pretrained": {}}, {"lora": 5}, {"fields": {"bf16": "x"}}],
)
def test_a_record_with_entries_of_another_kind_is_refused(tmp_path, changes):
    record = {"fields": {"num_layers": 2}, "head": "lm"}
    (tmp_path / "model.json").write_text(json.dumps(record))
    assert read_model_file(tmp_path).head == "lm"
    (tmp_path / "model.json").write_text(json.dumps({**record, **changes}))
    assert "model.json cannot be read" in refusal(read_model_file, tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere", "/etc/passwd"])
def test_a_manifest_names_files_of_its_folder_only(tmp_path, name):
    files = {name: [0, "00"]}
    content = {"format": 1, "files": files, "sha256": _sum_list(files)}
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="which lies outside the checkpoint"):
        verify_checkpoint(tmp_path)
