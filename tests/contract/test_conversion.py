"""Models between Hugging Face folders and Megatron checkpoints, whole or not at all."""

import json
import pickle
import shutil

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from chatlearn.cli.main import main
from chatlearn.errors import CheckpointError, ConfigError
from megatron_adapters import PolicyTrainer, RewardInference, ValueTrainer
from megatron_adapters.conversion import parity
from megatron_adapters.conversion.convert import ConversionOptions, convert, verify
from megatron_adapters.conversion.tiny_models import TINY_MODELS, build_tiny_model
from megatron_adapters.conversion.worlds import build_module

SHORT = ("qwen2", "gemma3", "deepseek_v3")
TO_MEGATRON, TO_HF = ConversionOptions("megatron"), ConversionOptions("hf", max_file_bytes=20000)


@pytest.fixture
def folder(tmp_path):
    build_tiny_model("qwen2").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family in SHORT else pytest.mark.long)
        for family in TINY_MODELS
    ],
)
def test_there_and_back_is_bit_identical(tmp_path, family):
    build_tiny_model(family).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mg", TO_MEGATRON)
    assert verify(tmp_path / "hf", tmp_path / "mg", TO_MEGATRON) > 20
    convert(tmp_path / "mg", tmp_path / "back", TO_HF)
    assert verify(tmp_path / "mg", tmp_path / "back", TO_HF) > 20
    assert parity.compare_exports(tmp_path / "hf", tmp_path / "back")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "mg"]


LAYOUTS = {
    "TP 2 PP 2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "EP 2": (2, {"expert_model_parallel_size": 2}),
}


@pytest.mark.parametrize(("family", "layout"), [("llama3", "TP 2 PP 2"), ("mixtral", "EP 2")])
def test_a_run_loads_a_converted_checkpoint_and_its_own_is_converted(
    ranks, tmp_path, family, layout
):
    build_tiny_model(family).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "mg", TO_MEGATRON)
    size, fields = LAYOUTS[layout]
    args = (str(tmp_path / "hf"), fields, str(tmp_path / "mg"), str(tmp_path / "saved"))
    ranks.run(size, load_and_save, *args)
    convert(tmp_path / "saved", tmp_path / "back", ConversionOptions("hf"))
    assert parity.compare_exports(tmp_path / "hf", tmp_path / "back")


def load_and_save(rank, folder, layout, loaded, saved):
    """A trainer that starts from other values, loads a checkpoint, and saves its own."""
    from pathlib import Path

    fields = {"pretrained": folder, "bf16": False, **layout}
    module = build_module(PolicyTrainer, "policy", fields)
    for tensor in module.weight_tensors().values():
        tensor.zero_()
    module.load_checkpoint(loaded)
    module.checkpoint_dir = Path(saved)
    module.save_checkpoint(3)


@pytest.mark.parametrize("family", ["llama2", "gemma3", "qwen3_moe"])
def test_classification_heads_go_in_and_out(ranks, tmp_path, family):
    model = build_tiny_model(family, head="scalar")
    model.save_pretrained(tmp_path / "hf")
    sequences = parity.make_sequences(61, count=6)
    with torch.no_grad():
        expected = [float(model(ids[None]).logits[0, -1]) for ids in sequences]
    args = (str(tmp_path / "hf"), sequences, str(tmp_path / "out"))
    found = ranks.run(2, reward, *args)[-1]
    assert found == pytest.approx(expected, abs=1e-4)
    assert parity.compare_exports(tmp_path / "hf", tmp_path / "out")
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


def reward(rank, folder, sequences, target):
    from pathlib import Path

    from chatlearn.data.rows import RowId

    fields = {"pretrained": folder, "bf16": False, "tensor_model_parallel_size": 2}
    module = build_module(RewardInference, "reward", fields)
    module.row_ids = [RowId(number, 0) for number in range(len(sequences))]
    data = {
        "prompt_token_ids": [ids[:1] for ids in sequences],
        "response_token_ids": [ids[1:] for ids in sequences],
    }
    found = module.forward_step(data)["rewards"].tolist()
    module.save_huggingface(Path(target))
    return found


def test_a_value_model_from_a_language_model_leaves_as_a_classifier(ranks, folder, tmp_path):
    ranks.run(1, save_value, str(folder), str(tmp_path / "out"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert float(model.score.weight.abs().max()) == 0.0
    body = AutoModelForCausalLM.from_pretrained(folder).model.state_dict()
    assert all(torch.equal(t, model.model.state_dict()[name]) for name, t in body.items())


def save_value(rank, folder, target):
    from pathlib import Path

    fields = {"pretrained": folder, "bf16": False}
    build_module(ValueTrainer, "value", fields).save_huggingface(Path(target))


def test_a_model_from_scratch_needs_a_family_and_gets_one(folder, tmp_path):
    convert(folder, tmp_path / "mg", TO_MEGATRON)
    record = json.loads((tmp_path / "mg" / "model.json").read_text())
    (tmp_path / "mg" / "model.json").write_text(
        json.dumps({**record, "family": None, "pretrained": None})
    )
    with pytest.raises(ConfigError, match="a Hugging Face folder has a family: name one of llama2"):
        convert(tmp_path / "mg", tmp_path / "out", TO_HF)
    with pytest.raises(ConfigError, match="the model is no qwen3"):
        convert(tmp_path / "mg", tmp_path / "out", ConversionOptions("hf", family="qwen3"))
    convert(tmp_path / "mg", tmp_path / "out", ConversionOptions("hf", family="qwen2"))
    ids = torch.tensor([[3, 4, 5]])
    one, other = (AutoModelForCausalLM.from_pretrained(f) for f in (folder, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_values_are_rounded_once(folder, tmp_path):
    options = ConversionOptions("hf", dtype="bfloat16")
    convert(folder, tmp_path / "mg", TO_MEGATRON)
    convert(tmp_path / "mg", tmp_path / "out", options)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert all(torch.equal(t.bfloat16(), after[name]) for name, t in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert verify(tmp_path / "mg", tmp_path / "out", options) > 20


def damage(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__layers__1__self_attn__q_proj__bias": None},
            r"model.layers.1.self_attn.q_proj.bias \(32,\) is missing",
        ),
        (
            {"model__layers__9__mlp__x": torch.zeros(1), "model__layers__1__mlp__x": torch.ones(2)},
            r"model.layers.1.mlp.x \(2,\) in model.safetensors belongs to no part",
        ),
        (
            {"model__norm__weight": torch.zeros(7)},
            r"model.norm.weight in model.safetensors has the shape \(7,\), expected \(32,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, tmp_path, changes, message):
    damage(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "mg", TO_MEGATRON)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]


def test_a_truncated_file_is_named(folder, tmp_path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged"):
        convert(folder, tmp_path / "mg", TO_MEGATRON)


def test_an_incomplete_folder_is_named(folder, tmp_path):
    convert(folder, tmp_path / "mg", TO_MEGATRON)
    convert(tmp_path / "mg", tmp_path / "parts", TO_HF)
    next((tmp_path / "parts").glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match="model-00002.* is missing"):
        convert(tmp_path / "parts", tmp_path / "again", TO_MEGATRON)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor"):
        convert(folder, tmp_path / "again", TO_MEGATRON)


def test_a_difference_is_found(folder, tmp_path):
    convert(folder, tmp_path / "mg", TO_MEGATRON)
    shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] += 1
    damage(tmp_path / "other", **{"model__norm__weight": tensors["model.norm.weight"]})
    with pytest.raises(CheckpointError, match="differs from .* in 1 of .*final_layernorm"):
        verify(tmp_path / "other", tmp_path / "mg", TO_MEGATRON)


def test_a_write_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    from megatron_adapters.weights import folder_writer

    convert(folder, tmp_path / "mg", TO_MEGATRON)

    def fail(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder_writer.os, "pwrite", fail)
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        convert(tmp_path / "mg", tmp_path / "out", TO_HF)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mg"]


def test_the_command(folder, tmp_path, capsys):
    target = str(tmp_path / "mg")
    assert main(["convert", str(folder), target, "--to", "megatron", "--verify"]) == 0
    assert "tensors read back and equal" in capsys.readouterr().out
    assert main(["convert", str(folder), target, "--to", "megatron"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["convert", str(folder)]) == 2
    assert main(["convert", str(tmp_path), str(tmp_path / "x"), "--to", "hf"]) == 1
    assert "is neither a Hugging Face folder" in capsys.readouterr().err


class Attack:
    """Writes a file where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_metadata_that_would_run_something_is_refused_and_does_not_run(folder, tmp_path):
    convert(folder, tmp_path / "mg", TO_MEGATRON)
    whole = (tmp_path / "mg" / ".metadata").read_bytes()
    (tmp_path / "mg" / ".metadata").write_bytes(pickle.dumps(Attack(tmp_path / "owned")))
    with pytest.raises(CheckpointError, match="names .*open, which is no record of a checkpoint"):
        convert(tmp_path / "mg", tmp_path / "out", TO_HF)
    assert not (tmp_path / "owned").exists()
    (tmp_path / "mg" / ".metadata").write_bytes(whole[:-50])
    with pytest.raises(CheckpointError, match=".metadata is damaged"):
        convert(tmp_path / "mg", tmp_path / "out", TO_HF)
    (tmp_path / "mg" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=".metadata is missing"):
        convert(tmp_path / "mg", tmp_path / "out", TO_HF)
