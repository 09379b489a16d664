"""`chatlearn check` and `chatlearn plan` on Megatron models, whose precision is left open."""

import json
import re

import pytest

from chatlearn.cli.main import main
from megatron_adapters.precision import has_native_bf16

CONFIG = """
models:
  policy: &small
    {module: "megatron_adapters:PolicyInference", num_gpu: 2, tensor_model_parallel_size: 2,
     num_layers: 2, hidden_size: 8, num_attention_heads: 2, ffn_hidden_size: 16, vocab_size: 16,
     make_vocab_size_divisible_by: 1, max_sequence_length: 32}
  reference: *small
  policy_trainer:
    {<<: *small, module: "megatron_adapters:PolicyTrainer", tensor_model_parallel_size: 1}
  reward: {module: "scripts.demo.verifier:RuleVerifier", num_gpu: 0, num_cpu: 1}
runtime: {engine: grpo}
"""
# Embedding and head 2 x 128, two layers of 256 + 384 + 16, the last norm 8.
COUNT = 1576


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("assumed", [(), ("--assume-devices", "8")])
def test_sizes_are_those_of_the_precision_that_the_devices_will_give(config_file, capsys, assumed):
    is_bf16 = bool(assumed) or has_native_bf16("cpu")
    num_bytes = COUNT * (2 if is_bf16 else 4)
    assert main(["check", config_file, *assumed]) == 0
    assert f"1.58 k parameters, {num_bytes / 1000:.2f} kB" in capsys.readouterr().out
    assert main(["plan", config_file, *assumed, "--json"]) == 0
    (sync,) = json.loads(capsys.readouterr().out.splitlines()[-1])["syncs"]
    assert sync["sync"] == "policy_trainer -> policy"
    # The trainer's one replica goes whole to both ranks: matrices cut in two, norms twice.
    assert sum(sync["bytes_by_link"].values()) == num_bytes + 5 * 8 * num_bytes // COUNT


def test_the_configured_precision_counts(config_file, capsys):
    overrides = [f"models.{name}.bf16=false" for name in ("policy", "policy_trainer")]
    assert main(["check", config_file, *overrides, "--assume-devices", "8"]) == 0
    assert f"1.58 k parameters, {COUNT * 4 / 1000:.2f} kB" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["check", "plan"])
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("policy_trainer.add_qkv_bias=true", "no place for .*linear_qkv.bias of policy_trainer"),
        ("policy.untie_embeddings_and_output_weights=false", "no place for output_layer.weight"),
        ("policy_trainer.untie_embeddings_and_output_weights=false", "which policy_trainer lacks"),
        ("policy.ffn_hidden_size=32", "policy_trainer has the shape"),
    ],
)
def test_models_that_differ_are_refused_by_the_names_of_tensors(
    config_file, capsys, command, override, told
):
    assert main([command, config_file, f"models.{override}", "--assume-devices", "8"]) == 2
    error = capsys.readouterr().err
    assert re.search(f"weight sync policy_trainer -> policy: .*{told}", error)


def test_a_check_leaves_open_what_only_the_workers_know(config_file, capsys):
    models = ("policy", "reference", "policy_trainer")
    fields = ("num_moe_experts=2", "moe_ffn_hidden_size=8", "moe_grouped_gemm=true")
    overrides = [f"models.{name}.{field}" for name in models for field in fields]
    overrides.append("models.policy.sequence_parallel=true")
    assert main(["plan", config_file, *overrides, "--assume-devices", "8"]) == 2
    assert "moe_grouped_gemm: what a rank of such a model holds" in capsys.readouterr().err
    assert main(["check", config_file, *overrides, "--assume-devices", "8"]) == 0


def test_models_of_one_process_copy_within_it(config_file, capsys):
    alone = ["models.policy.num_gpu=1", "models.policy.tensor_model_parallel_size=1"]
    alone += ["models.reference.num_gpu=1", "models.reference.tensor_model_parallel_size=1"]
    alone += ["models.policy_trainer.num_gpu=1"]
    for backend, link in (("local", "process"), ("ray", "node")):
        assert main(["plan", config_file, *alone, f"runtime.backend={backend}", "--json"]) == 0
        (sync,) = json.loads(capsys.readouterr().out.splitlines()[-1])["syncs"]
        assert [name for name, size in sync["bytes_by_link"].items() if size] == [link]


@pytest.mark.parametrize("value", ["nan", "inf", "0"])
def test_a_speed_that_is_none_is_refused(config_file, capsys, value):
    assert main(["plan", config_file, "--assume-devices", "8", "--node-gb-s", value]) == 2
    assert f"--node-gb-s is {value}: give a speed above 0" in capsys.readouterr().err
