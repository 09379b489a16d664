"""The example programs run, and what they leave is what it says."""

from __future__ import annotations

import pytest
import torch

from scripts.examples import huggingface_ppo

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

MODELS = ("policy", "reference", "value", "policy_trainer", "value_trainer")
FEW = ["runtime.num_episode=2", "runtime.save_episode_interval=2"]
# So that nothing is rounded.
FEW += [f"models.{name}.bf16=false" for name in MODELS]


@pytest.fixture
def model(tmp_path):
    huggingface_ppo.make_model(tmp_path / "model")
    return tmp_path / "model"


def run(model, tmp_path, *options):
    overrides = [*FEW, f"runtime.output_dir={tmp_path / 'runs'}"]
    return huggingface_ppo.main(["--model", str(model), *options, *overrides])


def test_ppo_goes_from_a_huggingface_folder_to_another(model, tmp_path, capsys):
    written = run(model, tmp_path)
    assert "transformers loads" in capsys.readouterr().out
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (model, written)
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (written / "chat_template.jinja").is_file()


def test_adapters_that_were_trained_are_merged_in_the_folder(model, tmp_path):
    written = run(model, tmp_path, "--lora")
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, written.parent / "adapter")
    merged = adapted.merge_and_unload().state_dict()
    found = transformers.AutoModelForCausalLM.from_pretrained(written).state_dict()
    assert {name for name in found if not torch.equal(found[name], before[name])} == {
        name for name in found if "_proj.weight" in name
    }
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)
    value = written.parents[1] / "value_trainer" / "adapter"
    assert "score" in (value / "adapter_config.json").read_text()
