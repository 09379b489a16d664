"""Keys that users of ChatLearn know: those that are read as ours, and those not supported."""

from __future__ import annotations

from typing import Any

__all__ = ["UNSUPPORTED", "rename_runtime_keys"]

_OFFLOAD = "models that share a device keep their memory; give each model its own devices"
_RESUME = "set runtime.resume to the checkpoint folder to go on from, or to auto"
_PROFILE = "set runtime.profile: true; timeline.json in the run folder shows every stage"

UNSUPPORTED: dict[str, dict[str, str]] = {
    "runtime_env": {"platform": "start the cluster with scripts/run_ray_cluster.sh"},
    "models": {
        "batch_generation": "generation batches continuously, without sorting by length",
        "config_dir": "model_config_file is relative to the file that names it",
        "args_dict": "write the fields flat, or use args for free options",
        "force_free_memory": _OFFLOAD,
        "free_grad_buffers": _OFFLOAD,
        "free_memory": _OFFLOAD,
        "fsdp_size": "use Megatron's use_distributed_optimizer",
        "model_type": "set module",
        "num_replica": "it follows from num_gpu: num_gpu / (TP x PP x CP)",
        "offload_optimizer_states": _OFFLOAD,
        "offload_weights": _OFFLOAD,
        "sp_size": "use sequence_parallel with tensor_model_parallel_size",
        "zero_size": "use Megatron's use_distributed_optimizer",
    },
    "runtime": {
        "bucket_size_mb_in_memory_manager": _OFFLOAD,
        "concurrent_comm": "weight sync is always concurrent",
        "concurrent_setup": "models are always set up at the same time",
        "consumed_samples": "it is state of the run, not a setting",
        "cpu_schedule_strategy": "CPU-only models are packed",
        "data_checkpoint_path": _RESUME,
        "data_rerank": "samples of one prompt stay in one call where its size allows",
        "free_sync_collective_group": "the groups are kept for the run",
        "load_data_checkpoint_iteration": _RESUME,
        "log_config_file": "write enable_tensorboard, enable_wandb, wandb_project under runtime",
        "log_interval": "metrics are written every episode",
        "max_iteration_per_sample": "write the loop as a method of a module",
        "nsys": _PROFILE,
        "param_sync_comm_type": "weight sync chooses for each link; see weight_sync_transport",
        "param_sync_max_workers": "every worker takes part in weight sync",
        "policy_to_regroup_queue": "rows are always joined by row id",
        "profiler_dir": _PROFILE,
        "routed_expert_regrouping_comm_type": "weight sync moves experts like other weights",
        "save_interval": "use save_episode_interval",
    },
    "": {"rlhf": "the section is called runtime"},
}


def rename_runtime_keys(section: dict[str, Any], problems: list[str]) -> None:
    """Read ChatLearn's names of the runtime section as ours; `problems` gets contradictions."""
    if "enable_resume_training" in section:
        is_on = section.pop("enable_resume_training")
        if not isinstance(is_on, bool):
            problems.append(
                f"runtime.enable_resume_training: got {is_on!r}, expected true or false"
            )
        elif is_on and section.get("resume") is None:
            section["resume"] = "auto"
        elif not is_on and section.get("resume") is not None:
            problems.append(
                "runtime.enable_resume_training: false, but resume is set: keep resume only"
            )
    if "max_data_ckpt_nums" in section:
        count = section.pop("max_data_ckpt_nums")
        if section.setdefault("save_total_limit", count) != count:
            problems.append(
                "runtime: max_data_ckpt_nums is ChatLearn's name of save_total_limit, and they "
                f"differ: {count} and {section['save_total_limit']}; keep save_total_limit"
            )
