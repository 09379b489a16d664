"""What this rank holds of the model's weights, in the words of chatlearn.parallel.sharding.

Megatron's own `sharded_state_dict()` says for every parameter the global name, shape and offset.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.model_building import unwrap

__all__ = ["describe_weights", "weight_tensors"]

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def weight_tensors(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The live parameters of all chunks by local name (`<chunk>.<parameter>`), detached."""
    return {
        f"{number}.{name}": parameter.detach()
        for number, chunk in enumerate(chunks)
        for name, parameter in unwrap(chunk).named_parameters()
    }


def describe_weights(chunks: Sequence[Any], vocab_size: int) -> tuple[TensorShard, ...]:
    """The shards that this rank holds, one per parameter (two for a gated MLP's first layer).

    The vocabulary's padding is left out, so that layouts with different padding agree.

    Args:
        chunks: from `build_model`.
        vocab_size: tokens without padding.
    """
    shards: list[TensorShard] = []
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        local_names = {
            parameter.data_ptr(): f"{number}.{name}" for name, parameter in model.named_parameters()
        }
        tensors = dict(model.named_parameters())
        metadata = {"dp_cp_group": _data_group()}
        for entry in _sharded_tensors(model.sharded_state_dict(metadata=metadata)):
            shard = _describe(entry, local_names, tensors, number)
            clipped = _clip_vocabulary(shard, vocab_size) if shard is not None else None
            if clipped is not None:
                shards.append(clipped)
    return tuple(shards)


def _data_group() -> Any:
    from megatron.core import parallel_state as mpu

    return mpu.get_data_parallel_group(with_context_parallel=True)


def _sharded_tensors(state: dict[str, Any]) -> Iterator[Any]:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for value in nested_values(state):
        entry = value.build() if isinstance(value, ShardedTensorFactory) else value
        parts = entry if isinstance(entry, list | tuple) else [entry]
        for part in nested_values({"parts": list(parts)}):
            if isinstance(part, ShardedTensor) and part.data is not None:
                yield part


def _describe(
    entry: Any,
    local_names: dict[int, str],
    parameters: dict[str, torch.Tensor],
    number: int,
) -> TensorShard | None:
    """One ShardedTensor as a shard; None for what is no parameter."""
    data = entry.data
    name = local_names.get(data.data_ptr())
    offset: tuple[int, ...] = (0,) * data.dim()
    if name is None:
        # A part of a parameter, such as the up half of a gated MLP.
        found = _find_part(data, parameters)
        if found is None:
            return None
        local, offset = found
        name = f"{number}.{local}"
    lead = len(entry.global_shape) - data.dim()
    box = Box(tuple(entry.global_offset), (1,) * lead + tuple(data.shape))
    return TensorShard(
        key=entry.key,
        global_shape=tuple(entry.global_shape),
        box=box,
        dtype=str(data.dtype).removeprefix("torch."),
        local_name=name,
        local_offset=offset,
    )


def _find_part(
    part: torch.Tensor, parameters: dict[str, torch.Tensor]
) -> tuple[str, tuple[int, ...]] | None:
    storage = part.untyped_storage().data_ptr()
    for name, parameter in parameters.items():
        if parameter.untyped_storage().data_ptr() != storage or part.dim() != parameter.dim():
            continue
        distance = part.storage_offset() - parameter.storage_offset()
        if 0 <= distance < parameter.numel():
            row = distance // max(1, parameter.stride(0))
            return name, (row, *(0,) * (parameter.dim() - 1))
    return None


def _clip_vocabulary(shard: TensorShard, vocab_size: int) -> TensorShard | None:
    if shard.key not in _VOCABULARY or shard.global_shape[0] <= vocab_size:
        return shard
    whole = (vocab_size, *shard.global_shape[1:])
    box = shard.box.intersect(Box((0,) * len(whole), whole))
    if box is None:
        return None
    return TensorShard(shard.key, whole, box, shard.dtype, shard.local_name, shard.local_offset)
