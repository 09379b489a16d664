"""Initial values that depend only on the seed, the parameter's global name and global index.

So every layout of one model starts from the same weights.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from chatlearn.parallel.counter_random import counter_normal, stable_hash
from chatlearn.parallel.sharding import TensorShard

if TYPE_CHECKING:
    from megatron_adapters.model_config import MegatronSettings

__all__ = ["initialize_weights"]

_OUTPUT_PROJECTIONS = ("linear_proj.weight", "linear_fc2.weight")
_CHUNK_ELEMENTS = 1 << 22


def initialize_weights(chunks: Sequence[Any], settings: "MegatronSettings", seed: int) -> None:
    """Fill every matrix of the chunks with normal numbers; vectors keep what modules gave them.

    The deviation is `init_method_std`, for the projections back into the residual stream divided
    by sqrt(2 * num_layers) (Radford et al. 2019, GPT-2). A scalar head stays zero.
    """
    from megatron_adapters.weights.live_description import describe_weights, weight_tensors

    config = settings.transformer
    std = config.init_method_std
    tensors = weight_tensors(chunks)
    with torch.no_grad():
        for shard in describe_weights(chunks, settings.shape.padded_vocab_size):
            tensor = tensors[shard.local_name]
            if tensor.dim() < 2 or _is_scalar_head(shard):
                continue
            is_projection = shard.key.endswith(_OUTPUT_PROJECTIONS)
            scale = std / (2 * config.num_layers) ** 0.5 if is_projection else std
            _fill(tensor[shard.local_slices()], shard, scale, seed)


def _is_scalar_head(shard: TensorShard) -> bool:
    return shard.key == "output_layer.weight" and shard.global_shape[0] == 1


def _fill(region: torch.Tensor, shard: TensorShard, scale: float, seed: int) -> None:
    """Fill a matrix row block by row block, to bound the memory that float64 takes."""
    mixed = seed * 0x1000003 ^ stable_hash(shard.key)
    lead = shard.box.offset[: len(shard.box.offset) - 2]
    first_row, first_column = shard.box.offset[-2:]
    rows, columns = shard.box.shape[-2:]
    flat = region.reshape(-1, columns)
    device = region.device
    counters = [torch.tensor(offset, device=device) for offset in lead]
    column = torch.arange(first_column, first_column + columns, device=device)[None, :]
    step = max(1, _CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        row = torch.arange(first_row + start, first_row + stop, device=device)[:, None]
        values = counter_normal(mixed, *counters, row, column) * scale
        flat[start:stop].copy_(values)
