# pyright: standard, reportPrivateImportUsage=false
"""What this rank holds of the live model's weights, in the words of chatlearn.parallel.sharding.

Megatron's own `sharded_state_dict()` says for every weight the global name, shape and offset.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from chatlearn.errors import ChatLearnError
from chatlearn.parallel.sharding import Box, TensorShard
from megatron_adapters.model_building import unwrap

__all__ = ["describe_weights", "frozen_names", "weight_tensors"]

_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def weight_tensors(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The live weights of all chunks by local name (`<chunk>.<parameter>`), detached.

    Those are all parameters, and the buffers that Megatron saves: the bias by which a router
    balances its experts.
    """
    return {
        f"{number}.{name}": tensor.detach()
        for number, chunk in enumerate(chunks)
        for name, tensor in _saved_tensors(unwrap(chunk)).items()
    }


def frozen_names(chunks: Sequence[Any]) -> tuple[str, ...]:
    """Local names of the parameters that get no gradient."""
    return tuple(
        f"{number}.{name}"
        for number, chunk in enumerate(chunks)
        for name, parameter in unwrap(chunk).named_parameters()
        if not parameter.requires_grad and ".adapters." not in name
    )


def describe_weights(chunks: Sequence[Any], vocab_size: int) -> tuple[TensorShard, ...]:
    """The shards that this rank holds, one per weight (two for a gated MLP's first layer).

    The vocabulary's padding is left out, so that layouts with different padding agree.

    Args:
        chunks: from `build_model`.
        vocab_size: tokens without padding.

    Raises:
        ChatLearnError: Megatron does not describe all of a weight.
    """
    shards: list[TensorShard] = []
    for number, chunk in enumerate(chunks):
        model = unwrap(chunk)
        tensors = {f"{number}.{name}": t for name, t in _saved_tensors(model).items()}
        local = _LocalTensors(tensors)
        metadata = {"dp_cp_group": _data_group()}
        entries = _sharded_tensors(model.sharded_state_dict(metadata=metadata))
        described = [shard for entry in entries if (shard := _describe(entry, local)) is not None]
        _check_complete(described, tensors)
        clipped = (_clip_vocabulary(shard, vocab_size) for shard in described)
        shards.extend(shard for shard in clipped if shard is not None)
    return tuple(shards)


@dataclass(frozen=True)
class _Region:
    """A local tensor, and where in it a part begins."""

    name: str
    offset: tuple[int, ...]


class _LocalTensors:
    """Finds the local tensor that a view is a part of, by its address."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = sorted(
            (
                (tensor.data_ptr(), name, tensor)
                for name, tensor in tensors.items()
                if tensor.numel()
            ),
            key=lambda entry: entry[0],
        )
        self._starts = [start for start, _, _ in self._tensors]

    def find(self, part: torch.Tensor) -> _Region | None:
        """The tensor with whole rows of it in `part` (all, or the up half of a gated MLP)."""
        at = bisect_right(self._starts, part.data_ptr()) - 1
        if at < 0:
            return None
        start, name, tensor = self._tensors[at]
        distance = part.data_ptr() - start
        if distance >= tensor.numel() * tensor.element_size() or part.dim() != tensor.dim():
            return None
        if not tensor.dim():
            return _Region(name, ())
        row = distance // (tensor.stride(0) * tensor.element_size())
        return _Region(name, (row, *(0,) * (tensor.dim() - 1)))


def _saved_tensors(model: Any) -> dict[str, torch.Tensor]:
    """What Megatron saves of a model. Its router turns its bias to float32 when this is read."""
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if isinstance(tensor, torch.Tensor)
        and not name.endswith("_extra_state")
        and ".adapters." not in name
    }


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


def _describe(entry: Any, local: _LocalTensors) -> TensorShard | None:
    """One ShardedTensor as a shard; None for what is no part of a weight."""
    data = entry.data
    region = local.find(data)
    if region is None:
        return None
    lead = len(entry.global_shape) - data.dim()
    return TensorShard(
        key=entry.key,
        global_shape=tuple(entry.global_shape),
        box=Box(tuple(entry.global_offset), (1,) * lead + tuple(data.shape)),
        dtype=str(data.dtype).removeprefix("torch."),
        local_name=region.name,
        local_offset=region.offset,
    )


def _check_complete(shards: Sequence[TensorShard], tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a model of which a sync would leave something out in silence."""
    missing = {name: tensor.numel() for name, tensor in tensors.items()}
    for shard in shards:
        missing[shard.local_name] -= shard.box.num_elements
    wrong = [name for name, count in missing.items() if count]
    if wrong:
        raise ChatLearnError(
            f"sharded_state_dict() does not describe each element of {', '.join(wrong)} once: "
            "such a module's weights cannot be synced (with experts: set moe_grouped_gemm=false)"
        )


def _clip_vocabulary(shard: TensorShard, vocab_size: int) -> TensorShard | None:
    if shard.key not in _VOCABULARY or shard.global_shape[0] <= vocab_size:
        return shard
    whole = (vocab_size, *shard.global_shape[1:])
    box = shard.box.intersect(Box((0,) * len(whole), whole))
    if box is None:
        return None
    return TensorShard(shard.key, whole, box, shard.dtype, shard.local_name, shard.local_offset)
