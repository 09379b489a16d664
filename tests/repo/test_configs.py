"""Every shipped config loads, and passes `chatlearn check` for the devices that it is for."""

import subprocess
import sys
from pathlib import Path

import pytest

from chatlearn.cli.main import main
from chatlearn.config import load_config
from scripts.examples.huggingface_ppo import make_model

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
RECIPES = {
    "ppo_7b_8gpu.yaml": 8,
    "grpo_7b_8gpu.yaml": 8,
    "ppo_70b_64gpu.yaml": 64,
    "grpo_70b_64gpu.yaml": 64,
}


def test_the_recipes_are_shipped():
    assert set(RECIPES) <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_config(path.relative_to(ROOT)).models


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_passes_the_check(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    if path.name == "huggingface_ppo.yaml":
        # Its model is the user's; the example makes one.
        make_model(tmp_path / "model")
        monkeypatch.setenv("MODEL_DIR", str(tmp_path / "model"))
        capsys.readouterr()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    devices = RECIPES.get(path.name)
    arguments = ["--assume-devices", str(devices)] if devices else []
    code = main(["check", str(path.relative_to(ROOT)), *arguments])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    assert "unknown" not in captured.out or devices is None


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_uses_all_its_devices_and_no_more(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    count = RECIPES[name]
    assert main(["check", f"configs/{name}", "--assume-devices", str(count)]) == 0
    assert f"placement on {count // 8} x 8 GPUs" in capsys.readouterr().out
    assert main(["check", f"configs/{name}", "--assume-devices", str(count // 2)]) == 2
    assert f"the models ask for {count} GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_micro_batch_has_room_for_the_samples_of_a_prompt(name):
    config = load_config(ROOT / "configs" / name)
    tokens = config.runtime.train_micro_batch_tokens
    longest = config.models["policy_trainer"].megatron["max_sequence_length"]
    assert tokens is not None
    # Responses of half of their limit, after a prompt of as many tokens.
    half = config.models["policy"].generation.max_new_tokens // 2
    samples = config.runtime.num_samples_per_prompt
    assert tokens >= max(longest, half * (1 + samples))


@pytest.mark.parametrize("name", ["ppo_7b_8gpu.yaml", "ppo_70b_64gpu.yaml"])
def test_a_recipe_takes_paths_from_the_environment(name, monkeypatch):
    monkeypatch.setenv("TRAIN_DATA", "/data/prompts.jsonl")
    monkeypatch.setenv("POLICY_CHECKPOINT", "/data/policy")
    config = load_config(ROOT / "configs" / name)
    assert config.runtime.data_path == ("/data/prompts.jsonl",)
    assert config.models["policy_trainer"].load == "/data/policy"
    assert config.models["reference"].load == "/data/policy"


def test_checking_megatron_models_loads_neither_megatron_nor_ray():
    program = (
        "import sys; from chatlearn.cli.main import main\n"
        "code = main(['check', 'configs/ppo_7b_8gpu.yaml', '--assume-devices', '8'])\n"
        "found = {'ray', 'megatron'} & set(sys.modules)\n"
        "sys.exit(f'{code} {found}' if code or found else 0)\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
