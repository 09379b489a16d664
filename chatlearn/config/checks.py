"""Combinations that cannot work, each with the sum that does not add up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chatlearn.config.field_checks import find_bad_fields
from chatlearn.config.schema import RuntimeEnvConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatlearn.config.schema import Config, ModelConfig, RuntimeConfig

__all__ = ["find_bad_folder_name", "find_contradictions"]

_NO_ENV = dict(RuntimeEnvConfig())
# More than any cluster has; a slip of the keyboard is named before it is planned.
_MOST_RANKS = 100_000
_LONGEST_NAME = 1000
_UNEVEN = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "pipeline_model_parallel_layout",
)


def find_contradictions(config: Config) -> list[str]:
    """Every contradiction, one line each; empty where there is none."""
    problems = [line for name, model in config.models.items() for line in _check_model(name, model)]
    problems.extend(_check_names(config))
    problems.extend(_check_batches(config.runtime))
    problems.extend(_check_colocation(config))
    problems.extend(_check_profile(config.runtime))
    algorithm = config.runtime.algorithm
    if algorithm.rollout_correction != "none" and algorithm.old_logprobs == "rollout":
        problems.append(
            f"runtime.algorithm: rollout_correction={algorithm.rollout_correction} weighs the "
            "trainer's old probabilities against the sampler's; with old_logprobs=rollout they "
            "are the same: use old_logprobs: auto"
        )
    # A resolved config names every key, with its default where nothing was set.
    given = [name for name, value in config.runtime_env if value != _NO_ENV[name]]
    if given and config.runtime.backend == "local":
        problems.append(
            f"runtime_env: {', '.join(sorted(given))} is for workers of the ray backend; with "
            "runtime.backend: local the models live in this process: set it up before it starts"
        )
    return problems


def find_bad_folder_name(name: str) -> str | None:
    """Why a name is none for a single folder that commands can be given; None where it is one."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        return f"expected a plain folder name, got {name!r}"
    if not name.isprintable():
        return f"expected a plain folder name, of printable characters, got {name!r}"
    if name.startswith("-"):
        return f"expected a plain folder name that no command takes for an option, got {name!r}"
    return None


def _check_names(config: Config) -> Iterator[str]:
    """Names of files and classes that no system takes."""
    problem = find_bad_folder_name(config.runtime.exp_name)
    if problem:
        yield f"runtime.exp_name: {problem}"
    named = [("runtime", config.runtime), *((f"models.{n}", m) for n, m in config.models.items())]
    for path, section in named:
        for key in ("chat_template", "engine", "exp_name", "family", "load", "module", "output_dir",
                    "pretrained", "resume", "tokenizer"):  # fmt: skip
            value = getattr(section, key, None)
            if isinstance(value, str) and len(value) > _LONGEST_NAME:
                yield f"{path}.{key}: got {len(value)} characters, expected {_LONGEST_NAME} or less"


def _check_model(name: str, model: ModelConfig) -> Iterator[str]:
    path = f"models.{name}"
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    cp, ep = model.context_parallel_size, model.expert_model_parallel_size
    ranks = tp * pp * cp
    if max(ranks, model.num_gpu or 0, model.num_cpu) > _MOST_RANKS:
        yield (
            f"{path}: num_gpu={model.num_gpu}, num_cpu={model.num_cpu}, TP x PP x CP = {tp} x {pp} "
            f"x {cp}: a model has at most {_MOST_RANKS} ranks"
        )
    if model.num_gpu is not None and model.num_gpu > 0:
        if model.num_gpu % ranks:
            yield (
                f"{path}: num_gpu={model.num_gpu} is no multiple of TP x PP x CP = "
                f"{tp} x {pp} x {cp} = {ranks}"
            )
        if model.num_cpu:
            yield f"{path}: num_gpu and num_cpu are both set; num_cpu is for models without a GPU"
    if model.num_gpu == 0 and model.num_cpu == 0:
        yield f"{path}: num_gpu and num_cpu are both 0; give the model one or the other"
    if model.num_cpu and (ranks > 1 or model.num_cpu % model.cpu_per_process):
        yield (
            f"{path}: a CPU-only model has TP = PP = CP = 1 and num_cpu={model.num_cpu} a multiple "
            f"of cpu_per_process={model.cpu_per_process}; got TP x PP x CP = {ranks}"
        )
    # A pretrained model's fields come from its folder, and are checked then.
    is_open = model.pretrained is not None and "num_layers" not in model.megatron
    if ep > 1 and not model.megatron.get("num_moe_experts") and not is_open:
        yield f"{path}: expert_model_parallel_size={ep} needs num_moe_experts"
    experts = model.megatron.get("num_moe_experts")
    if ep > 1 and experts and experts % ep:
        yield f"{path}: num_moe_experts={experts} is no multiple of expert_model_parallel_size={ep}"
    yield from find_bad_fields(path, model)
    if not any(isinstance(v, int) and v < 1 for v in model.megatron.values()):
        yield from _check_shapes(path, model, tp, pp)


def _check_shapes(path: str, model: ModelConfig, tp: int, pp: int) -> Iterator[str]:
    fields: dict[str, Any] = model.megatron
    for key in ("num_attention_heads", "ffn_hidden_size", "moe_ffn_hidden_size"):
        value = fields.get(key)
        if isinstance(value, int) and value % tp:
            yield f"{path}: {key}={value} is no multiple of tensor_model_parallel_size={tp}"
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if heads and hidden and not fields.get("kv_channels") and hidden % heads:
        yield f"{path}: hidden_size={hidden} is no multiple of num_attention_heads={heads}"
    groups = fields.get("num_query_groups")
    if heads and groups and heads % groups:
        yield f"{path}: num_attention_heads={heads} is no multiple of num_query_groups={groups}"
    if groups and groups % tp and tp % groups:
        yield f"{path}: num_query_groups={groups} and tensor_model_parallel_size={tp} do not divide"
    yield from _check_depth(path, model, tp, pp)


def _check_depth(path: str, model: ModelConfig, tp: int, pp: int) -> Iterator[str]:
    fields: dict[str, Any] = model.megatron
    layers, vpp = fields.get("num_layers"), model.virtual_pipeline_model_parallel_size
    if vpp and vpp > 1 and pp == 1:
        yield f"{path}: virtual_pipeline_model_parallel_size={vpp} needs more than one stage"
    if layers and not any(fields.get(key) for key in _UNEVEN) and layers % (pp * (vpp or 1)):
        yield f"{path}: num_layers={layers} is no multiple of PP x VPP = {pp} x {vpp or 1}"
    if fields.get("sequence_parallel") and tp == 1:
        yield f"{path}: sequence_parallel needs tensor_model_parallel_size > 1"
    longest = fields.get("max_sequence_length")
    wanted = model.generation.max_new_tokens
    if longest and wanted is not None and wanted >= longest:
        yield (
            f"{path}: generation.max_new_tokens={wanted} leaves no room for "
            f"a prompt in max_sequence_length={longest}"
        )


def _check_batches(runtime: RuntimeConfig) -> Iterator[str]:
    micro, batch = runtime.train_micro_batch_size, runtime.train_global_batch_size
    is_by_rows = runtime.train_micro_batch_tokens is None
    if batch is not None and is_by_rows and batch % micro and batch > micro:
        yield (
            f"runtime: train_global_batch_size={batch} is no multiple of "
            f"train_micro_batch_size={micro}"
        )
    if batch is not None and runtime.sample_per_episode is not None:
        samples = runtime.sample_per_episode * runtime.num_samples_per_prompt
        if batch > samples:
            yield (
                f"runtime: train_global_batch_size={batch} is more than an episode has: "
                f"sample_per_episode x num_samples_per_prompt = {runtime.sample_per_episode} x "
                f"{runtime.num_samples_per_prompt} = {samples}"
            )
    ratio, paths = runtime.data_ratio, runtime.data_path
    if ratio is not None and paths is not None and len(ratio) != len(paths):
        yield f"runtime: data_ratio has {len(ratio)} numbers for {len(paths)} files of data_path"


def _check_profile(runtime: RuntimeConfig) -> Iterator[str]:
    chosen = runtime.profile_episode
    if chosen is None:
        return
    if not runtime.profile:
        yield f"runtime: profile_episode={chosen} needs profile: true"
    if chosen > runtime.num_episode:
        yield f"runtime: profile_episode={chosen} is more than num_episode={runtime.num_episode}"


def _check_colocation(config: Config) -> Iterator[str]:
    seen: set[str] = set()
    for group in config.runtime.colocation_groups:
        for name in group:
            if name not in config.models:
                yield f"runtime.colocation: {name!r} is not one of the models {list(config.models)}"
            if name in seen:
                yield f"runtime.colocation: {name!r} is in more than one group"
            seen.add(name)
