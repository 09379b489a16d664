"""`chatlearn check`: what it prints, and that it starts nothing."""

import subprocess
import sys

import pytest
from rich.console import Console

from chatlearn.cli.main import main
from chatlearn.cli.report import print_plan
from chatlearn.config import load_config
from chatlearn.engine.from_config import build_engine

MODULES = """
from chatlearn import BaseModule, Engine, Environment, Trainer

class Plain(BaseModule):
    def score(self, data, level):
        return data

class Language(BaseModule):
    head = "lm"

    def forward_step(self, data):
        return data

    def train_step(self, data):
        return None

def build(config):
    policy, verifier, trainer = Language("policy"), Plain("verifier"), Language("trainer")

    def env_flow(batch):
        return verifier.score(policy.forward_step(batch), level=2)

    def trainer_flow(batch):
        trainer.train_step(batch)

    engine = Engine(Environment(env_flow), Trainer(trainer_flow), name="own")
    return engine.set_parameter_sync(trainer, policy)
"""
CONFIG = """
models:
  policy: &small
    {num_gpu: 4, tensor_model_parallel_size: 2, num_layers: 2, hidden_size: 8,
     num_attention_heads: 2, ffn_hidden_size: 16, vocab_size: 10, bf16: true}
  trainer: {<<: *small, pipeline_model_parallel_size: 2}
  verifier: {num_cpu: 2}
runtime:
  engine: flows_of_check:build
  colocation: ["policy,trainer"]
"""
# Embedding and head 2 x 80, two layers of 256 + 384 + 16, the last norm 8.
COUNT = "1.48 k parameters, 2.96 kB"


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    (tmp_path / "flows_of_check.py").write_text(MODULES, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flows_of_check", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    yield path
    sys.modules.pop("flows_of_check", None)


def printed(capsys, *arguments):
    """The lines of a check as lists of their cells."""
    code = main(["check", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    return [
        [cell.strip() for cell in line.split("  ") if cell] for line in captured.out.splitlines()
    ]


def test_the_graphs_show_calls_inputs_outputs_and_lines(config_file, capsys):
    lines = printed(capsys, config_file, "--assume-devices", 8)
    where = [line for line in lines if line and line[0] == "verifier.score"][0]
    assert where[:3] == ["verifier.score", "policy.forward_step", "yes"]
    assert where[3].endswith("flows_of_check.py:21")
    assert ["environment flow"] in lines
    assert ["trainer flow"] in lines


def test_the_models_show_layout_replicas_places_and_size(config_file, capsys):
    lines = printed(capsys, config_file, "--assume-devices", 8)
    assert ["policy", "Language", *"211112", "4", "4 devices", COUNT] in lines
    assert ["trainer", "Language", *"221111", "4", "4 devices", COUNT] in lines
    assert ["verifier", "Plain", *"111112", "2", "2 CPUs", "unknown"] in lines


def test_the_placement_shows_which_models_stand_on_which_devices(config_file, capsys):
    lines = printed(capsys, config_file, "--assume-devices", 8)
    assert ["placement on 1 x 8 GPUs"] in lines
    assert ["0", "policy", "1", "2", "0:2 .. 0:3 (1/2 each)"] in lines
    assert ["0", "0-3", "policy, trainer"] in lines
    assert ["any", "CPU", "verifier"] in lines


def test_models_apart_stand_on_devices_of_their_own(config_file, capsys):
    override = "runtime.colocation=[]"
    lines = printed(capsys, config_file, "--assume-devices", 8, override)
    assert ["0", "0-3", "policy"] in lines
    assert ["0", "4-7", "trainer"] in lines


def test_the_weight_sync_shows_layouts_ranks_and_bytes(config_file, capsys):
    lines = printed(capsys, config_file, "models.policy.sync_frequency=2")
    layouts = "TP2 PP2 -> TP2"
    assert ["trainer -> policy", layouts, "4 -> 4", "2", COUNT, "every 2 episodes"] in lines
    assert lines[-1] == ["ok: nothing was started"]


def test_a_sync_between_models_of_other_sizes_says_so(config_file, capsys):
    lines = printed(capsys, config_file, "models.policy.vocab_size=20")
    [sync] = [line for line in lines if line and line[0] == "trainer -> policy"]
    assert sync[4].startswith(f"{COUNT} -> ")
    assert sync[4].endswith("they differ")


def test_a_terminal_gets_tables_with_borders(config_file, capsys):
    config = load_config(config_file)
    engine = build_engine(config)
    console = Console(force_terminal=True, width=200, color_system=None)
    print_plan(engine, engine.plan(config, 8), config, console)
    text = capsys.readouterr().out
    assert "│ trainer -> policy " in text
    assert "flows_of_check.py:21" in text


def test_check_loads_neither_ray_nor_megatron(config_file):
    program = (
        "import sys; from chatlearn.cli.main import main\n"
        f"code = main(['check', {str(config_file)!r}, '--assume-devices', '4'])\n"
        "found = {'ray', 'megatron', 'megatron_adapters'} & set(sys.modules)\n"
        "sys.exit(f'{code} {found}' if code or found else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=config_file.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
