"""The typed configuration: frozen records of the three sections and what is below them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from chatlearn.config.guards import GuardsConfig

__all__ = [
    "AlgorithmConfig",
    "Config",
    "GenerationConfig",
    "ModelConfig",
    "RuntimeConfig",
    "RuntimeEnvConfig",
]


def _as_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a whole number")
    return value


Count = Annotated[int, Field(ge=0), BeforeValidator(_as_number)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_as_number)]
Seconds = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


def _as_tuple(value: Any) -> Any:
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


def _as_sources(value: Any) -> Any:
    return (value,) if isinstance(value, str | dict) else _as_tuple(value)


def _as_ratio(value: Any) -> Any:
    if isinstance(value, int):
        return (value,)
    if isinstance(value, str):
        return tuple(int(part) for part in value.split(","))
    return _as_tuple(value)


def _as_check(value: Any) -> Any:
    # YAML's true and false, as ChatLearn's users write them.
    return {True: "full", False: "false"}.get(value, value) if isinstance(value, bool) else value


SyncCheck = Annotated[Literal["false", "digest", "full"], BeforeValidator(_as_check)]
Texts = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, coerce_numbers_to_str=True)


class RuntimeEnvConfig(_Section):
    """What Ray gives every worker process; passed on as Ray's `runtime_env`.

    It holds in a cluster that is joined as in one of the run's own. Workers run in `working_dir`.
    """

    pip: Texts = Field(default=(), description="Python packages to install in the workers")
    py_modules: Texts = Field(default=(), description="local packages to copy to the workers")
    working_dir: str | None = Field(default=None, description="folder to copy to the workers")
    excludes: Texts = Field(default=(), description="patterns left out of `working_dir`")
    env_vars: dict[str, str] = Field(default={}, description="environment variables of the workers")


LoraTarget = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class DataSource(_Section):
    """Prompts of one place."""

    path: str = Field(description="file or folder")
    split: str | None = Field(
        default=None, description="of a folder that `datasets` saved with splits"
    )
    columns: dict[str, str] = Field(
        default={}, description="new names of columns, each with the name in the file"
    )


Sources = Annotated[tuple[str | DataSource, ...], BeforeValidator(_as_sources)]


class GenerationConfig(_Section):
    """How a policy samples."""

    temperature: float = Field(default=1.0, ge=0, description="divides the logits; 0: greedy")
    eval_temperature: float | None = Field(
        default=None, ge=0, description="temperature of `eval_step`; unset: `temperature`"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="keep the likeliest tokens of this mass"
    )
    top_k: Count = Field(default=0, description="keep this many likeliest tokens; 0: all")
    max_new_tokens: Positive | None = Field(
        default=None,
        description="longest response, tokens; unset: what the context leaves room for",
    )
    stop_token_ids: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), description="tokens that end a response besides the tokenizer's end token"
    )
    num_slots: Positive | None = Field(
        default=None,
        description="sequences that a replica decodes at once; unset: as many as a call has rows, "
        "within `kv_cache_memory_share`",
    )
    kv_cache_memory_share: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="share of a device's memory (of the machine's, on a CPU) that each rank's "
        "cache may take where `num_slots` is unset",
    )
    prefill_chunk_tokens: Positive = Field(
        default=2048,
        description="prompt tokens that go through the model in one step, while others decode",
    )


class AlgorithmConfig(_Section):
    """Losses and advantages, shared by every model of the run."""

    loss: Literal["auto", "ppo", "dpo", "sft"] = Field(
        default="auto", description="the policy trainer's loss; auto: by the columns of the data"
    )
    gamma: Share = Field(default=1.0, description="discount of a token's reward")
    lam: Share = Field(default=0.95, description="GAE's lambda")
    clip_ratio_low: float = Field(
        default=0.2, gt=0, lt=1, description="ratio is clipped to 1 - this"
    )
    clip_ratio_high: float = Field(default=0.2, gt=0, description="ratio is clipped to 1 + this")
    value_clip: float | None = Field(
        default=0.2, gt=0, description="values move at most this far per update; null: no clipping"
    )
    value_loss_coef: float = Field(default=1.0, ge=0, description="weight of the value loss")
    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the entropy bonus")
    kl_coef: float = Field(default=0.01, ge=0, description="weight of the KL to the reference")
    kl_in: Literal["auto", "reward", "loss", "none"] = Field(
        default="auto",
        description="where the KL enters: the token rewards, the loss, or nowhere; auto: the "
        "rewards with a critic (GAE), the loss with group advantages",
    )
    kl_estimator: Literal["auto", "k1", "k2", "k3"] = Field(
        default="auto", description="estimator of the KL; auto: k1 in the reward, k3 in the loss"
    )
    whiten_advantages: bool = Field(
        default=True, description="zero mean, unit deviation over the global batch (GAE advantages)"
    )
    advantage_normalization: Literal["population_std", "unbiased_std", "leave_one_out", "none"] = (
        Field(default="population_std", description="what group advantages are divided by (GRPO)")
    )
    loss_aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = Field(
        default="token_mean", description="how token losses become one number"
    )
    old_logprobs: Literal["auto", "recompute", "rollout"] = Field(
        default="auto",
        description="denominator of the ratio: scored by the trainer before the episode's first "
        "update, or as the sampler reported; auto: scored where an episode has several updates or "
        "`rollout_correction` needs it, else the ratio is 1",
    )
    rollout_correction: Literal["none", "truncate"] = Field(
        default="none",
        description="weight of the policy loss for what the sampler computes differently; "
        "truncate: the old probability over the sampler's, at most `rollout_correction_cap`",
    )
    rollout_correction_cap: float = Field(
        default=2.0, gt=0, description="most that `rollout_correction` weighs a token with"
    )
    dpo_beta: float = Field(default=0.1, gt=0, description="DPO's beta")


class LoraConfig(_Section):
    """Low-rank adapters of a trained Megatron model; its own weights stand still."""

    rank: Positive = Field(default=16, description="rank of the adapters")
    alpha: float = Field(default=32.0, gt=0, description="they are scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of an adapter's input")
    use_rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead")
    target_modules: tuple[LoraTarget, ...] = Field(
        default=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="PEFT's names of the linear layers that get one",
    )
    adapter: str | None = Field(
        default=None,
        description="PEFT adapter to start from; the other keys then follow from it",
    )


class ModelConfig(_Section):
    """One model: where it runs, how it is cut, what it is."""

    module: str | None = Field(default=None, description="its class, `package.module:Class`")
    num_gpu: Count | None = Field(
        default=None, description="devices in total; unset: one replica's"
    )
    num_cpu: Count = Field(default=0, description="CPUs in total, for a model without a device")
    gpu_per_process: Literal[1] = Field(default=1, description="devices of one rank; always 1")
    cpu_per_process: Positive = Field(default=1, description="CPUs of one rank of a CPU-only model")
    trainable: bool = Field(
        default=False, description="trained; set by itself for the trainer's models"
    )
    tensor_model_parallel_size: Positive = Field(default=1, description="tensor parallel ranks")
    pipeline_model_parallel_size: Positive = Field(default=1, description="pipeline stages")
    virtual_pipeline_model_parallel_size: Positive | None = Field(
        default=None, description="model chunks of each pipeline stage"
    )
    context_parallel_size: Positive = Field(default=1, description="context parallel ranks")
    expert_model_parallel_size: Positive = Field(default=1, description="expert parallel ranks")
    expert_tensor_parallel_size: Positive | None = Field(
        default=None, description="tensor parallel ranks within an expert; unset: as the model's"
    )
    generation_batch_size: Positive | None = Field(
        default=None, description="rows of one inference call; unset: runtime's"
    )
    sync_frequency: Count = Field(
        default=1,
        description="as a sync's destination: new weights every so many episodes; 0: never",
    )
    model_config_file: str | None = Field(
        default=None, description="YAML of this model's keys, merged beneath the ones given here"
    )
    load: str | None = Field(default=None, description="checkpoint folder to start from")
    pretrained: str | None = Field(
        default=None,
        description="Hugging Face folder to start from; its config.json gives the model's fields",
    )
    save_huggingface: bool = Field(
        default=False, description="write a Hugging Face folder beside each checkpoint, too"
    )
    family: str | None = Field(
        default=None,
        description="family of the Hugging Face folder to write; unset: that of `pretrained`",
    )
    lora: LoraConfig | None = Field(
        default=None, description="train low-rank adapters; unset: all weights"
    )
    generation: GenerationConfig = Field(default=GenerationConfig(), description="sampling")
    args: dict[str, Any] = Field(default={}, description="free options of a user's own module")
    megatron: dict[str, Any] = Field(
        default={}, description="Megatron-Core's fields; write them flat, beside the keys above"
    )


class RuntimeConfig(_Section):
    """The run: episodes, batches, data, limits, logs."""

    engine: str | None = Field(
        default=None, description="rlhf, grpo, dpo, online_dpo, eval or `package.module:build`"
    )
    backend: Literal["ray", "local"] = Field(
        default="ray", description="ray: workers in Ray; local: one rank per model, in this process"
    )
    num_episode: Positive = Field(default=1, description="episodes")
    sample_per_episode: Positive | None = Field(
        default=None, description="prompts per episode; unset: the data set's length"
    )
    num_samples_per_prompt: Positive = Field(default=1, description="samples of each prompt")
    num_training_epoch: Positive = Field(default=1, description="passes over an episode's samples")
    generation_batch_size: Positive | None = Field(
        default=None,
        description="rows of one inference call; unset: an even share for each replica",
    )
    train_micro_batch_size: Positive = Field(
        default=8,
        description="most rows of one forward-backward pass on one rank; rows are spread so that "
        "tokens are even. Without effect where `train_micro_batch_tokens` is set",
    )
    train_micro_batch_tokens: Positive | None = Field(
        default=None,
        description="most tokens of one forward-backward pass on one rank (a prompt counts once "
        "where the model shares it among samples; a longer row passes alone; in bfloat16 on a "
        "processor up to 15 tokens or 7 per cent that only fill up come on top); unset: "
        "`train_micro_batch_size` decides",
    )
    train_global_batch_size: Positive | None = Field(
        default=None, description="rows of one update; unset: all rows of the episode"
    )
    save_episode_interval: Positive | None = Field(
        default=None, description="save a checkpoint every so many episodes; unset: never"
    )
    save_total_limit: Positive | None = Field(
        default=None, description="checkpoints to keep, the newest; unset: all"
    )
    async_save: bool = Field(
        default=True,
        description="write checkpoints beside the run's work: workers take a copy of what is saved "
        "(host memory of that size) and go on",
    )
    resume: str | None = Field(
        default=None,
        description="checkpoint folder to go on from; auto: the newest good one of this "
        "`exp_name`, if there is one",
    )
    eval_episode_interval: Count | None = Field(
        default=None, description="evaluate every so many episodes; unset: after the last; 0: never"
    )
    enable_eval_before_training: bool = Field(default=False, description="evaluate before training")
    data_path: Sources | None = Field(
        default=None,
        description="prompts: files (JSON lines, JSON, CSV, Parquet, text), folders of files, or "
        "folders that `datasets` saved; an entry may be a mapping of path, split and columns",
    )
    eval_data_path: Sources | None = Field(
        default=None, description="prompts of the evaluation, as `data_path`"
    )
    data_ratio: Annotated[tuple[Positive, ...], BeforeValidator(_as_ratio)] | None = Field(
        default=None, description="how several data sets are mixed, one number each"
    )
    data_shuffle: bool = Field(default=True, description="shuffle the prompts of each epoch")
    tokenizer: str | None = Field(
        default=None,
        description="sentencepiece `.model` file or Hugging Face folder; unset: that of a model's "
        "`pretrained`",
    )
    chat_template: str | None = Field(
        default=None,
        description="Jinja file that turns chat messages into text; unset: the tokenizer's own",
    )
    prompts_too_long: Literal["error", "drop"] = Field(
        default="error",
        description="prompts that leave no room for a response: refuse the data, or leave them "
        "out and say how many",
    )
    seed: Count = Field(default=0, description="of data order, initial values and sampling")
    deterministic: bool = Field(
        default=False,
        description="compose batches by row id, so that tokens repeat from run to run",
    )
    debug: bool = Field(default=False, description="check invariants that cost time")
    stream_data_loader_type: Literal["fixed", "dynamic"] = Field(
        default="fixed",
        description="fixed: train while rollouts run, unless the whole episode has to be there "
        "(PPO or GRPO whose old log-probabilities are scored, see `algorithm.old_logprobs`, or a "
        "sample manager); dynamic: once all are there",
    )
    max_relay_episode: Annotated[int, Field(ge=-1)] = Field(
        default=0, description="episodes kept for a sample manager; -1: all, 0: the current one"
    )
    relay_episode_offset: Count = Field(default=0, description="first episode that is kept")
    training_shuffle_mode: Literal["batch", "sample"] = Field(
        default="batch", description="what later training epochs shuffle"
    )
    colocation: Annotated[
        tuple[Annotated[str | tuple[str, ...], BeforeValidator(_as_tuple)], ...],
        BeforeValidator(_as_tuple),
    ] = Field(
        default=(), description="groups of models that share devices: `policy,reference` or a list"
    )
    devices_per_node: Literal["auto"] | Positive = Field(
        default="auto",
        description="devices of a node; auto: its GPUs, and without GPUs as many logical slots "
        "as are asked for",
    )
    max_restarts: Count = Field(
        default=0,
        description="how often a run may recover from dead workers, lost nodes and broken "
        "connections; 0: the first ends it. What user code raises always does",
    )
    heartbeat_timeout_s: Seconds | None = Field(
        default=120.0,
        description="a worker that does not answer for so long, seconds, counts as dead; null: "
        "no limit",
    )
    stage_timeout_s: Seconds = Field(
        default=1800.0, description="limit of one call of a stage, seconds"
    )
    startup_timeout_s: Seconds = Field(
        default=300.0, description="limit of starting workers, seconds"
    )
    sync_timeout_s: Seconds = Field(default=300.0, description="limit of one weight sync, seconds")
    weight_sync_mode: Literal["in_place", "double"] = Field(
        default="in_place",
        description="`double` receives into a second copy, so that the old weights survive a "
        "sync that fails",
    )
    weight_sync_transport: Literal["auto", "collective"] = Field(
        default="auto",
        description="`collective`: gloo or NCCL also within a host, no shared memory or CUDA IPC",
    )
    coalesced_buffer_mb: Positive = Field(
        default=32, description="most MiB that a weight sync moves in one piece"
    )
    validate_param_sync: SyncCheck = Field(
        default="false",
        description="what is compared after a sync: `digest`: digests of all blocks, `full` (or "
        "true): every element; `false`: digests of a 64th of the blocks in turn, always on",
    )
    algorithm: AlgorithmConfig = Field(
        default=AlgorithmConfig(), description="losses and advantages"
    )
    guards: GuardsConfig = Field(
        default=GuardsConfig(), description="what happens when numbers go wrong"
    )
    profile: bool = Field(
        default=False,
        description="profile one episode: kernel timelines (Chrome traces) and the costliest "
        "operators of each stage, in `profile/` of the run folder",
    )
    profile_episode: Positive | None = Field(
        default=None, description="which, from 1; unset: the second, or the only one"
    )
    exp_name: str = Field(default="chatlearn", description="folder of the run within `output_dir`")
    output_dir: str = Field(default="runs", description="where run folders go")
    enable_tensorboard: bool = Field(default=True, description="write TensorBoard files")
    enable_wandb: bool = Field(default=False, description="log to Weights & Biases, if installed")
    wandb_project: str = Field(default="chatlearn", description="project name there")
    wandb_name: str | None = Field(default=None, description="run name there")

    @property
    def colocation_groups(self) -> tuple[tuple[str, ...], ...]:
        """The colocation groups as tuples of model names."""
        return tuple(
            tuple(name.strip() for name in group.split(",")) if isinstance(group, str) else group
            for group in self.colocation
        )


class Config(_Section):
    """The whole configuration."""

    runtime_env: RuntimeEnvConfig = Field(
        default=RuntimeEnvConfig(), description="worker environment"
    )
    models: dict[str, ModelConfig] = Field(default={}, description="the models, by name")
    runtime: RuntimeConfig = Field(default=RuntimeConfig(), description="the run")

    def model(self, name: str) -> ModelConfig:
        """The section of one model; defaults where the config does not name it."""
        return self.models.get(name, ModelConfig())
