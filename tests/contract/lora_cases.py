"""What the ranks of a Megatron world do in the tests of adapters."""

from __future__ import annotations

from pathlib import Path

from chatlearn.data.rows import RowId
from megatron_adapters import PolicyTrainer
from megatron_adapters.conversion.worlds import build_module
from megatron_adapters.lora.peft_files import read_peft_config
from megatron_adapters.lora.places import find_places
from megatron_adapters.scoring import score_tokens_of_rows
from megatron_adapters.weights.live_description import weight_tensors


def section(adapter):
    return read_peft_config(adapter).model_dump(exclude={"adapter"})


def build(options):
    return build_module(PolicyTrainer, "policy", {"bf16": False, "clip_grad": 0.0, **options})


def batch_of(module, sequences):
    part = sequences[module.data_parallel_rank :: module.data_parallel_size]
    module.row_ids = [[RowId(number, 0) for number in range(len(part))]]
    return [
        {
            "prompt_token_ids": [ids[:1] for ids in part],
            "response_token_ids": [ids[1:] for ids in part],
        }
    ]


def score(rank, options, sequences, load=None):
    del rank
    module = build(options)
    if load is not None:
        module.load_checkpoint(load)
    batches = module.pack_responses(batch_of(module, sequences))
    for chunk in module.model:
        chunk.eval()
    return score_tokens_of_rows(module.model, batches, module.groups)


def train(rank, options, sequences):
    """Gradients of a step, and whether it moved what it should."""
    del rank
    module = build({**options, "lr": 0.01})
    before = {name: t.clone() for name, t in weight_tensors(module.model).items()}
    start = [place.adapter.lora_A.detach().clone() for place in find_places(module.model)]
    module.train_step(batch_of(module, sequences))
    gradients = []
    for place in find_places(module.model):
        a, b = place.shards()
        gradients.append((a.key, a.box, place.adapter.lora_A.main_grad.clone()))
        gradients.append((b.key, b.box, place.adapter.lora_B.main_grad.clone()))
    after = weight_tensors(module.model)
    now = [place.adapter.lora_A for place in find_places(module.model)]
    return {
        "gradients": gradients,
        "is_base_still": all(before[name].equal(after[name]) for name in before),
        "has_moved": all(not one.equal(other) for one, other in zip(start, now, strict=True)),
    }


def steps(rank, options, sequences):
    del rank
    module = build(options)
    found = [module.train_step(batch_of(module, sequences)) for _ in range(3)]
    return [number for step in found for number in (step["loss"], step["grad_norm"])]


def save(rank, options, folder):
    del rank
    build(options).adapted.save(Path(folder))


def checkpoint(rank, options, folder):
    del rank
    module = build(options)
    module.checkpoint_dir = Path(folder)
    module.save_checkpoint(0)


def merge(rank, options):
    del rank
    module = build(options)
    module.before_weight_sync()
    tensors = module.weight_tensors()
    return [
        (shard.key, shard.box, tensors[shard.local_name][shard.local_slices()].clone())
        for shard in module.weight_shards_in("huggingface")
    ]
