"""What the ranks of a Megatron world do in the tests of the Hugging Face naming."""

from __future__ import annotations

import megatron_cases as cases
import torch

from chatlearn.data.rows import RowId
from chatlearn.parallel.counter_random import stable_hash


def box_slices(box):
    return tuple(slice(at, at + size) for at, size in zip(box.offset, box.shape, strict=True))


def fill(module):
    """Random numbers for every weight, vectors too, that depend on global name and index only."""
    tensors = module.weight_tensors()
    for shard in module.weight_shards():
        draw = torch.Generator().manual_seed(stable_hash(shard.key) % 2**31)
        whole = 0.2 * torch.randn(shard.global_shape, generator=draw)
        region = tensors[shard.local_name][shard.local_slices()]
        is_norm = "layernorm" in shard.key
        region.copy_(whole[box_slices(shard.box)].view(region.shape) + is_norm)


def export_renamed(rank, fields, rows=(), kind="reference"):
    """Description in the Hugging Face naming and content of the weights, and the rows' scores."""
    module = cases.build_module(rank, kind, fields)
    with torch.no_grad():
        fill(module)
    tensors = {name: tensor.clone() for name, tensor in module.weight_tensors().items()}
    shards = module.weight_shards_in("huggingface")
    if not rows:
        return shards, tensors, []
    module.row_ids = [RowId(number, 0) for number in range(len(rows))]
    data = {key: [row[key] for row in rows] for key in cases.SFT}
    scores = module.forward_step(data)["ref_logprobs"]
    return shards, tensors, [values.tolist() for values in scores]
