"""The model that the benchmark moves: Megatron's, with initial values that cost little."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

import torch

from chatlearn.parallel.counter_random import stable_hash
from megatron_adapters import PolicyReference
from megatron_adapters.layer_specs import build_block_spec

if TYPE_CHECKING:
    from chatlearn.parallel.sharding import TensorShard

__all__ = ["QuickReference"]


class QuickReference(PolicyReference):
    """A reference model whose weights are sums of a number for the row and one for the column.

    The library's own initial values cost a minute where a model of 500 MB is built eight times on
    two cores.
    """

    def setup(self) -> None:
        """Build this rank's chunk and fill it; the same in every layout."""
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.module import Float16Module

        config = copy(self.settings.transformer)
        config.init_method = _leave
        config.output_layer_init_method = _leave
        config.embedding_init_method = _leave
        use_te = self.settings.use_te
        shape = self.settings.shape
        model = GPTModel(
            config=config,
            transformer_layer_spec=build_block_spec(config, None, use_te=use_te),
            vocab_size=shape.padded_vocab_size,
            max_sequence_length=shape.max_sequence_length,
            pre_process=self.groups.is_first_stage,
            post_process=self.groups.is_last_stage,
            position_embedding_type="rope",
        )
        self.model = [Float16Module(config, model.to(self.device))]
        weights = self.weight_tensors()
        with torch.no_grad():
            for shard in self.weight_shards():
                _fill(weights[shard.local_name][shard.local_slices()], shard)


def _leave(weight: torch.Tensor) -> None:
    """An initialiser that does nothing."""


def _fill(region: torch.Tensor, shard: TensorShard) -> None:
    lead = len(shard.box.shape) - len(shard.local_offset)
    seed = stable_hash(f"{shard.key} {shard.box.offset[:lead]}")
    draw = torch.Generator().manual_seed(seed)
    region.zero_()
    for axis in range(region.dim()):
        at = lead + axis
        numbers = torch.randn(shard.global_shape[at], generator=draw)
        own = numbers.narrow(0, shard.box.offset[at], region.shape[axis])
        behind = (1,) * (region.dim() - axis - 1)
        region.add_(own.to(region.device, region.dtype).view(-1, *behind))
