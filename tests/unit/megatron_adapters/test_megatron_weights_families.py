"""What config.json means in Megatron's fields, and back."""

import json

import pytest

from chatlearn.config import load_config
from chatlearn.errors import ConfigError
from megatron_adapters.conversion.tiny_models import TINY_MODELS
from megatron_adapters.weights.config_file import ModelConfigFile, read_config_file
from megatron_adapters.weights.families import FAMILIES, find_family
from megatron_adapters.weights.pretrained_fields import check_family, complete_fields

transformers = pytest.importorskip("transformers")


def write(folder, family, **changes):
    stem, options = TINY_MODELS[family]
    config = getattr(transformers, f"{stem}Config")(**{"vocab_size": 61, **options})
    values = {**config.to_dict(), "architectures": [FAMILIES[family].architecture("lm")]}
    values = {k: v for k, v in {**values, **changes}.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def read(folder):
    config = read_config_file(folder)
    return find_family(config).read_fields(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_back(tmp_path, family):
    config = read_config_file(write(tmp_path, family))
    assert find_family(config).name == family
    fields = find_family(config).read_fields(config)
    written = check_family(FAMILIES[family], fields, "lm")
    again = FAMILIES[family].read_fields(ModelConfigFile(tmp_path / "config.json", written))
    assert again == fields
    known = getattr(transformers, f"{TINY_MODELS[family][0]}Config")(**written)
    assert known.model_type == config.model_type


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fields_are_those_of_a_config(tmp_path, family):
    config = load_config({"models": {"m": read(write(tmp_path, family))}})
    assert config.model("m").megatron["vocab_size"] == 61


def test_older_versions_of_transformers_wrote_positions_elsewhere(tmp_path):
    scaling = {"type": "linear", "factor": 2.0}
    new = {"rope_parameters": "absent", "rope_theta": 5000.0, "rope_scaling": scaling}
    fields = read(write(tmp_path, "llama2", **new))
    assert fields["rotary_base"] == 5000.0
    assert fields["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    old = {
        "rope_parameters": "absent",
        "rope_theta": 2e6,
        "rope_local_base_freq": 20000.0,
        "layer_types": "absent",
        "sliding_window_pattern": 3,
    }
    fields = read(write(tmp_path, "gemma3", **old, num_hidden_layers=6))
    assert (fields["rotary_base"], fields["rotary_base_local"]) == (2e6, 20000.0)
    assert fields["window_attn_skip_freq"] == [1, 1, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama2", {"model_type": "bert"}, "model_type 'bert' .* is not supported; known are"),
        ("llama2", {"architectures": ["LlamaForX"]}, "LlamaForX is not supported"),
        ("llama2", {"quantization_config": {"a": 1}}, "quantization_config is"),
        ("llama2", {"hidden_act": "relu"}, 'hidden_act is "relu", expected "silu"'),
        ("llama2", {"mlp_bias": True}, "attention_bias and mlp_bias differ"),
        ("llama2", {"hidden_size": "absent"}, "hidden_size is missing"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is false"),
        ("deepseek_v3", {"num_experts_per_tok": 3}, "num_experts_per_tok=3 and topk_group=1"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ],
)
def test_what_is_not_built_here_is_refused_by_name(tmp_path, family, changes, message):
    parameters = {"rope_parameters": "absent"} if "partial_rotary_factor" in changes else {}
    write(tmp_path, family, **changes, **parameters)
    with pytest.raises(ConfigError, match=message):
        complete_fields(tmp_path, {}, "lm")


def test_the_users_fields_agree_or_are_refused(tmp_path):
    write(tmp_path, "qwen2", max_position_embeddings=128)
    found = complete_fields(tmp_path, {"max_sequence_length": 64, "add_qkv_bias": True}, "lm")
    assert found.fields["max_sequence_length"] == 64
    assert any("max_sequence_length: 64, of 128" in note for note in found.notes)
    with pytest.raises(ConfigError) as caught:
        complete_fields(
            tmp_path, {"hidden_size": 7, "window_size": [3, 0], "max_sequence_length": 999}, "lm"
        )
    text = str(caught.value)
    assert "hidden_size: got 7, expected" in text
    assert "window_size: got [3, 0], the folder's model has none" in text
    assert "max_sequence_length: got 999, expected 128" in text


def test_heads(tmp_path):
    write(tmp_path, "llama2")
    notes = complete_fields(tmp_path, {}, "scalar").notes
    assert any("it starts at zero" in note for note in notes)
    one = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "x"}}
    write(tmp_path, "llama2", **one)
    assert len(complete_fields(tmp_path, {}, "scalar").notes) == 1
    with pytest.raises(ConfigError, match="has no language model's head"):
        complete_fields(tmp_path, {}, "lm")
    write(tmp_path, "llama2", **{**one, "id2label": {"0": "x", "1": "y"}})
    with pytest.raises(ConfigError, match="with 2 labels; a reward or value model has one"):
        complete_fields(tmp_path, {}, "scalar")


def test_a_model_of_another_kind_has_no_place_in_a_family(tmp_path):
    fields = {**read(write(tmp_path, "llama2")), "qk_layernorm": True}
    with pytest.raises(ConfigError, match=r"the model is no llama2; .*\n    qk_layernorm"):
        check_family(FAMILIES["llama2"], fields, "lm")


def test_a_folder_without_a_config_says_so(tmp_path):
    with pytest.raises(ConfigError, match="holds no config.json"):
        read_config_file(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="expected a JSON object, got list"):
        read_config_file(tmp_path)
