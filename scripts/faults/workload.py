"""The tiny PPO run that faults happen to: its config, its data, and what it has trained on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import yaml

from chatlearn.metrics.timings import without_timings

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FAULTS", "read_account", "read_metrics", "write_workload"]

# Where each model can be hit.
FAULTS = {
    "policy": ("generation", "sync", "evaluation"),
    "reference": ("scoring",),
    "value": ("scoring",),
    "reward": ("scoring", "evaluation"),
    "policy_trainer": ("training", "sync", "saving"),
    "value_trainer": ("training", "saving"),
}
_SHAPE = {
    "num_layers": 2,
    "bf16": False,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 23,
    "max_sequence_length": 16,
    "lr": 1e-3,
}
_KINDS = {
    "policy": "SoakPolicy",
    "reference": "SoakReference",
    "value": "SoakValue",
    "policy_trainer": "SoakPolicyTrainer",
    "value_trainer": "SoakValueTrainer",
}
_WIDE = {
    "policy": {"num_gpu": 2, "tensor_model_parallel_size": 2},
    "policy_trainer": {"num_gpu": 2, "use_distributed_optimizer": True},
}


def write_workload(folder: Path, num_episodes: int, *, is_wide: bool, **runtime: Any) -> Path:
    """Write config and data; gives the config's path.

    Args:
        folder: of this workload.
        num_episodes: of the run.
        is_wide: policy and policy trainer have two ranks each.
        runtime: further entries of the runtime section.
    """
    moments = folder / "moments"
    moments.mkdir(parents=True, exist_ok=True)
    prompts = [{"prompt_token_ids": [3 + i % 20, 4 + i % 7, 5]} for i in range(10)]
    text = "".join(json.dumps(prompt) + "\n" for prompt in prompts)
    (folder / "prompts.jsonl").write_text(text, encoding="utf-8")
    models: dict[str, Any] = {
        name: {
            "module": f"scripts.faults.modules:{kind}",
            **_SHAPE,
            **(_WIDE.get(name, {}) if is_wide else {}),
        }
        for name, kind in _KINDS.items()
    }
    models["policy"]["generation"] = {"max_new_tokens": 5, "num_slots": 8, "stop_token_ids": [2]}
    models["reward"] = {"module": "scripts.faults.modules:SoakReward", "num_gpu": 0, "num_cpu": 1}
    for section in models.values():
        section["args"] = {"moments": str(moments)}
    content = {
        "models": models,
        "runtime": {
            "engine": "rlhf",
            "seed": 3,
            "num_episode": num_episodes,
            "sample_per_episode": 6,
            "generation_batch_size": 3,
            "train_global_batch_size": 3,
            "train_micro_batch_size": 3,
            "save_episode_interval": 1,
            "save_total_limit": 2,
            "eval_episode_interval": 1,
            "deterministic": True,
            "max_restarts": 1000,
            "heartbeat_timeout_s": 6,
            "startup_timeout_s": 90,
            "sync_timeout_s": 30,
            "stage_timeout_s": 60,
            "enable_tensorboard": False,
            "data_path": str(folder / "prompts.jsonl"),
            "eval_data_path": str(folder / "prompts.jsonl"),
            "output_dir": str(folder / "runs"),
            "exp_name": "soak",
            **runtime,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def read_account(folder: Path) -> dict[str, str]:
    """What every update was made on, in the end: who repeats an update counts the last time."""
    found: dict[str, str] = {}
    for run in sorted((folder / "runs" / "soak").glob("*")):
        for path in sorted(run.glob("trained-*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.endswith("}"):
                    note = json.loads(line)
                    found[json.dumps(note["at"])] = note["digest"]
    return found


def read_metrics(folder: Path, name: str = "soak") -> list[dict[str, float]]:
    """The metrics of the newest run, timings aside; with those that it goes on from."""
    runs = sorted((folder / "runs" / name).glob("*"))
    if not runs:
        return []
    lines = (runs[-1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [without_timings(json.loads(line)) for line in lines]
