"""Every file is checked strictly, but for those that are listed here."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
COMMENT = re.compile(r"^# pyright: (.+)", re.MULTILINE)
# A file's comment resets what pyproject.toml says of torch's and Ray's exports.
STANDARD = "standard, reportPrivateImportUsage=false"
# They call Ray, torch.distributed, Megatron or matplotlib, whose types say little.
NOT_STRICT = {
    "chatlearn/parallel/sockets.py",
    "chatlearn/runtime/explain.py",
    "chatlearn/runtime/heartbeats.py",
    "chatlearn/runtime/process_world.py",
    "chatlearn/runtime/ray_backend.py",
    "chatlearn/runtime/ray_cluster.py",
    "chatlearn/runtime/ray_placement.py",
    "chatlearn/runtime/ray_watches.py",
    "chatlearn/runtime/ray_worker.py",
    "chatlearn/sync/rank_calls.py",
    "chatlearn/sync/transport.py",
    "megatron_adapters/checkpoint_reader.py",
    "megatron_adapters/checkpoint_writer.py",
    "megatron_adapters/checkpointing.py",
    "megatron_adapters/attention.py",
    "megatron_adapters/conversion/megatron_files.py",
    "megatron_adapters/conversion/parity.py",
    "megatron_adapters/conversion/tiny_models.py",
    "megatron_adapters/decode_graph.py",
    "megatron_adapters/fused.py",
    "megatron_adapters/packed_model.py",
    "megatron_adapters/dense_layers.py",
    "megatron_adapters/generation_program.py",
    "megatron_adapters/layer_specs.py",
    "megatron_adapters/latent_attention.py",
    "megatron_adapters/short_attention.py",
    "megatron_adapters/lora/layers.py",
    "megatron_adapters/lora/spec.py",
    "megatron_adapters/model_building.py",
    "megatron_adapters/modules/inference.py",
    "megatron_adapters/modules/text_rows.py",
    "megatron_adapters/modules/trainer.py",
    "megatron_adapters/parallel_state.py",
    "megatron_adapters/patches/apply.py",
    "megatron_adapters/patches/cpu_random.py",
    "megatron_adapters/patches/cpu_tensor_kind.py",
    "megatron_adapters/patches/cpu_torch.py",
    "megatron_adapters/pipeline.py",
    "megatron_adapters/rotary.py",
    "megatron_adapters/training.py",
    "megatron_adapters/vocab_parallel.py",
    "megatron_adapters/weights/live_description.py",
    "scripts/bench/sides/bare_decode.py",
    "scripts/bench/sides/peer_transformers.py",
    "scripts/bench/sides/peer_trl.py",
    "scripts/bench/sync_baselines.py",
    "scripts/bench/sync_megatron.py",
    "scripts/demo/report.py",
    "scripts/faults/checkpoints.py",
    "scripts/examples/huggingface_ppo.py",
    "scripts/fuzzing/checkpoint_cases.py",
}

# Triton is not installed where types are checked, and gives kernels none.
UNTYPED = "basic, reportMissingImports=false, reportIndexIssue=false"
KERNELS = {f"megatron_adapters/kernels/{name}.py" for name in ("decoding", "elementwise", "scores")}


def test_pyright_is_strict_wherever_no_file_is_listed():
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    settings = tomllib.loads(text)["tool"]["pyright"]
    assert settings["typeCheckingMode"] == "strict"
    assert not {"strict", "ignore", "exclude", "executionEnvironments"} & settings.keys()


def test_the_files_that_are_not_strict_are_those_listed():
    found = {}
    for folder in ("chatlearn", "megatron_adapters", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            kinds = COMMENT.findall(path.read_text("utf-8"))
            if kinds:
                found[str(path.relative_to(ROOT))] = kinds
    expected = {name: [STANDARD] for name in NOT_STRICT} | {name: [UNTYPED] for name in KERNELS}
    assert found == expected
