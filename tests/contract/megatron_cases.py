"""What the ranks of a Megatron world do in the contract tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from chatlearn.config import load_config
from chatlearn.data.balance import Limits, cut_batch, measure_loads
from chatlearn.data.rows import RowId
from chatlearn.parallel.context import WorkerContext
from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters import (
    PolicyInference,
    PolicyReference,
    PolicyTrainer,
    RewardInference,
    ValueInference,
    ValueTrainer,
)
from megatron_adapters.batches import Rows
from megatron_adapters.model_building import unwrap

SHAPE = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "vocab_size": 37,
    "max_sequence_length": 24,
    # Large enough that positions, masks and caches show in the outputs.
    "init_method_std": 0.1,
    "bf16": False,
    "lr": 0.01,
    "weight_decay": 0.0,
    "clip_grad": 1.0,
}
KINDS = {
    "policy": PolicyInference,
    "reference": PolicyReference,
    "trainer": PolicyTrainer,
    "value": ValueTrainer,
    "critic": ValueInference,
    "reward": RewardInference,
}
_NOT_MEGATRON = ("generation", "load")


def layout_of(fields, world_size) -> ParallelLayout:
    tp = fields.get("tensor_model_parallel_size", 1)
    pp = fields.get("pipeline_model_parallel_size", 1)
    cp = fields.get("context_parallel_size", 1)
    vpp = fields.get("virtual_pipeline_model_parallel_size") or 1
    return ParallelLayout(
        tp_size=tp,
        pp_size=pp,
        dp_size=world_size // (tp * pp * cp),
        cp_size=cp,
        vpp_size=vpp,
        ep_size=fields.get("expert_model_parallel_size", 1),
        etp_size=fields.get("expert_tensor_parallel_size"),
    )


def build_module(rank, kind, fields, *, seed=7, runtime=None, device="cpu"):
    """A module of this rank, set up as the engine does it."""
    world_size = torch.distributed.get_world_size()
    config = load_config(
        {
            "models": {"m": {**SHAPE, **fields}},
            "runtime": {"seed": seed, "tokenizer": None, **(runtime or {})},
        }
    )
    module = KINDS[kind]("m")
    context = WorkerContext(
        model_name="m",
        module=module,
        replica=0,
        rank=rank,
        layout=layout_of(fields, world_size),
        device=torch.device(device),
        data_parallel_group=None,
        host="127.0.0.1",
        node_id="node",
        process_id=0,
        timeout_s=60.0,
    )
    module.attach(context, config.model("m"), config.runtime, Path("."))
    module.initialize()
    module.setup()
    return module


def make_rows(count, seed=0):
    """Prompts and responses of uneven lengths, with what PPO needs."""
    draw = torch.Generator().manual_seed(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        prompt, length = (int(torch.randint(2, 8, (), generator=draw)) for _ in range(2))
        rows.append(
            {
                "prompt_token_ids": torch.randint(3, 37, (prompt,), generator=draw),
                "response_token_ids": torch.randint(3, 37, (length,), generator=draw),
                "rollout_logprobs": -3.6 + 0.1 * torch.randn(length, generator=draw),
                "ref_logprobs": -3.6 + 0.1 * torch.randn(length, generator=draw),
                "values": 0.1 * torch.randn(length, generator=draw),
                "rewards": torch.randn((), generator=draw),
            }
        )
    return rows


def lane_batches(module, rows, keys, micro_batch_size=2):
    """This rank's micro-batches, cut as the flow cuts them, and their row ids."""
    ids = [RowId(number, 0) for number in range(len(rows))]
    limits = Limits(rows=micro_batch_size)
    lane = cut_batch(ids, module.data_parallel_size, limits)[module.data_parallel_rank]
    data = [{key: [rows[i.prompt][key] for i in part] for key in keys} for part in lane]
    return data, [list(part) for part in lane]


SFT = ("prompt_token_ids", "response_token_ids")
PPO = (*SFT, "rollout_logprobs", "ref_logprobs", "values", "rewards")


def rows_of(prompts, tokens):
    """Rows of prompts and generated tokens."""
    return [
        {"prompt_token_ids": prompt, "response_token_ids": torch.tensor(ids)}
        for prompt, ids in zip(prompts, tokens, strict=True)
    ]


def train_supervised(rank, fields, num_steps=2, micro_batch_size=2):
    """Loss and gradient norm of a few supervised steps."""
    module = build_module(rank, "trainer", fields)
    data, _ = lane_batches(module, make_rows(7), SFT, micro_batch_size)
    steps = [module.train_step(data) for _ in range(num_steps)]
    return [(step["loss"], step["grad_norm"]) for step in steps]


def make_groups(num_prompts=3, num_samples=4, seed=1):
    """Rows of which several share a prompt; one response is a single token."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(num_prompts):
        prompt = torch.randint(3, 37, (4 + 3 * number,), generator=draw)
        for sample in range(num_samples):
            response = torch.randint(3, 37, (1 + 2 * sample + number,), generator=draw)
            rows.append({"prompt_token_ids": prompt, "response_token_ids": response})
    return rows


def train_groups(rank, fields, micro_batch_size, kind="sft"):
    """Loss, gradient norm and the whole gradient of one step over rows that share prompts."""
    module = build_module(rank, "value" if kind == "value" else "trainer", fields)
    _fill_head(module)
    rows, keys = make_groups(), SFT
    if kind != "sft":
        rows = [{**r, **_rollout_of(r)} for r in rows]
        keys = PPO
    data, ids = lane_batches(module, rows, keys, micro_batch_size)
    if kind == "ppo":
        module.row_ids = [ids]
        module.prepare_episode([data])
    module.row_ids = ids
    found = module.train_step(data)
    gradients = [p.main_grad.flatten().clone() for c in module.model for p in c.parameters()]
    num_tokens = sum(b.num_stream_tokens for b in module.pack_responses(data))
    return found["loss"], found["grad_norm"], torch.cat(gradients), num_tokens


def shares_prompts(rank, fields, kind):
    """Whether a model computes a prompt once for its samples: what it says, and what it packs."""
    module = build_module(rank, kind, fields)
    rows = Rows(*([row[key] for row in make_groups()] for key in SFT))
    num_rows = sum(len(p) + len(r) - 1 for p, r in zip(rows.prompts, rows.responses, strict=True))
    (batch,) = module.pack([rows])
    assert module.shares_prompts is (batch.num_stream_tokens < num_rows)
    return module.shares_prompts


def pack_within(rank, fields, num_tokens):
    """Tokens of the micro-batches that a budget of tokens makes of rows that share prompts."""
    module = build_module(rank, "trainer", fields)
    rows = make_groups()
    ids = [RowId(*divmod(at, 4)) for at in range(len(rows))]
    at = {row_id: number for number, row_id in enumerate(ids)}
    columns = {key: [row[key] for row in rows] for key in SFT}
    loads = dict(zip(ids, measure_loads(columns), strict=True))
    limits = Limits(tokens=num_tokens)
    (lane,) = cut_batch(ids, 1, limits, loads, shares_prompts=module.shares_prompts)
    data = [{key: [rows[at[i]][key] for i in part] for key in SFT} for part in lane]
    return [batch.num_stream_tokens for batch in module.pack_responses(data)]


def train_in_logit_chunks(rank, fields, micro_batch_size):
    """As `train_groups`, with logits of two tokens at a time."""
    from megatron_adapters import packed_model

    before = packed_model._MOST_LOGIT_BYTES
    packed_model._MOST_LOGIT_BYTES = 2 * 4 * SHAPE["vocab_size"]
    try:
        return train_groups(rank, fields, micro_batch_size)
    finally:
        packed_model._MOST_LOGIT_BYTES = before


def _fill_head(module):
    """A scalar head starts at zero, where nothing would show."""
    head = getattr(unwrap(module.model[-1]), "output_layer", None)
    if head is not None and module.head == "scalar":
        head.weight.data.copy_(torch.linspace(-1, 1, head.weight.numel())[None])


def _rollout_of(row):
    length = len(row["response_token_ids"])
    steps = torch.arange(length) / 10
    return {
        "rollout_logprobs": -3.6 + steps,
        "ref_logprobs": -3.5 - steps,
        "values": 0.1 * steps,
        "rewards": torch.tensor(float(length % 3)),
    }


def score_groups(rank, fields, kind="reference"):
    """What a model says of rows that share prompts, all at once and each alone."""
    module = build_module(rank, kind, fields)
    _fill_head(module)
    rows = make_groups()
    data = {key: [row[key] for row in rows] for key in SFT}
    method = {"reference": "ref_logprobs", "critic": "values", "reward": "rewards"}[kind]
    together = module.forward_step(data)[method]
    alone = [module.forward_step({key: [row[key]] for key in SFT})[method][0] for row in rows]
    return [
        (a.flatten().tolist(), b.flatten().tolist()) for a, b in zip(together, alone, strict=True)
    ]


def layer_kinds(rank, fields):
    """By layer number, from 1, the kind of the MLP in this rank's chunks."""
    module = build_module(rank, "trainer", fields)
    layers = [layer for chunk in module.model for layer in unwrap(chunk).decoder.layers]
    return {layer.layer_number: type(layer.mlp).__name__ for layer in layers}


def train_balanced(rank, fields, micro_batch_size):
    """As `train_supervised`, and by layer number the selection biases that came of it."""
    module = build_module(rank, "trainer", fields)
    data, _ = lane_batches(module, make_rows(7), SFT, micro_batch_size)
    steps = [module.train_step(data) for _ in range(2)]
    layers = [layer for chunk in module.model for layer in unwrap(chunk).decoder.layers]
    biases = {
        layer.layer_number: layer.mlp.router.expert_bias.tolist()
        for layer in layers
        if layer.mlp.router.expert_bias is not None
    }
    return [(step["loss"], step["grad_norm"]) for step in steps], biases


def train_ppo(rank, fields, kind="trainer"):
    """Metrics of the first and second update of one episode, in debug mode."""
    runtime = {"debug": True, "algorithm": {"entropy_coef": 0.01}}
    module = build_module(rank, kind, fields, runtime=runtime)
    data, ids = lane_batches(module, make_rows(7), PPO)
    module.num_updates = 2
    if kind == "trainer":
        module.row_ids = [ids]
        module.prepare_episode([data])
    module.row_ids = ids
    return [module.train_step(data) for _ in range(2)]


def score(rank, fields, rows, **options):
    """Log-probabilities of the responses by a full forward."""
    module = build_module(rank, "reference", fields, **options)
    module.row_ids = [RowId(number, 0) for number in range(len(rows))]
    data = {key: [row[key] for row in rows] for key in SFT}
    found = module.forward_step(data)["ref_logprobs"]
    return [values.tolist() for values in found]


def generate(rank, fields, prompts, **options):
    """Tokens and the log-probabilities that the sampler reports."""
    module = build_module(rank, "policy", fields, **options)
    module.row_ids = [RowId(number, 0) for number in range(len(prompts))]
    found = module.forward_step({"prompt_token_ids": prompts})
    tokens = [ids.tolist() for ids in found["response_token_ids"]]
    return tokens, [values.tolist() for values in found["rollout_logprobs"]]


def export_weights(rank, fields, seed):
    """Description and content of this rank's weights."""
    module = build_module(rank, "reference", fields, seed=seed)
    tensors = {name: tensor.clone() for name, tensor in module.weight_tensors().items()}
    return module.weight_shards(), tensors


def train_and_save(rank, fields, folder):
    """Train, save, go on: what the steps after the save gave."""
    module = build_module(rank, "trainer", fields)
    data, _ = lane_batches(module, make_rows(7), SFT)
    for _ in range(2):
        module.train_step(data)
    module.checkpoint_dir = Path(folder)
    module.save_checkpoint(2)
    steps = [module.train_step(data) for _ in range(2)]
    return [(step["loss"], step["grad_norm"]) for step in steps]


def resume(rank, fields, folder):
    """Load weights, optimizer and schedule, and go on."""
    from megatron_adapters.checkpointing import load_training

    module = build_module(rank, "trainer", fields, seed=11)
    iteration = load_training(folder, module.state)
    data, _ = lane_batches(module, make_rows(7), SFT)
    steps = [module.train_step(data) for _ in range(2)]
    return iteration, [(step["loss"], step["grad_norm"]) for step in steps]


def load_critic(rank, fields, folder):
    """A critic that starts from a policy: its head is zero, the rest is the policy's."""
    module = build_module(rank, "value", fields, seed=11)
    module.load_checkpoint(folder)
    names = module.weight_tensors()
    heads = [tensor for name, tensor in names.items() if "output_layer" in name]
    body = [tensor for name, tensor in names.items() if "final_layernorm" in name]
    return [bool((head == 0).all()) for head in heads], [t.tolist() for t in body]


def describe_live(rank, kind, fields):
    """This rank's shards by Megatron's own description."""
    return build_module(rank, kind, fields).weight_shards()


def describe_live_latent(rank, fields):
    """The same of a model with multi-latent attention, which only Megatron itself builds yet."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    from megatron_adapters.attention import FusedAttention
    from megatron_adapters.parallel_state import initialize_parallel_state
    from megatron_adapters.weights.live_description import describe_weights

    # Megatron-Core 0.16.1 believes here that Transformer Engine is installed.
    multi_latent_attention.HAVE_TE = isinstance(multi_latent_attention.TELinear, type)
    layout = layout_of(fields, torch.distributed.get_world_size())
    initialize_parallel_state(layout, torch.device("cpu"), 7)
    names = [name for name in fields if hasattr(MLATransformerConfig, name)]
    config = MLATransformerConfig(
        **{name: fields[name] for name in names},
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        rope_type="rope",
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        bias_activation_fusion=False,
    )
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    for layer in spec.layer_specs:
        # Megatron's own local attention core refuses what its latent attention gives it.
        layer.submodules.self_attention.submodules.core_attention = FusedAttention
    stage = layout.coordinates(rank).pp_rank
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=fields["vocab_size"],
        max_sequence_length=fields["max_sequence_length"],
        pre_process=stage == 0,
        post_process=stage == layout.pp_size - 1,
        position_embedding_type="rope",
    )
    return describe_weights([model], fields["vocab_size"])
