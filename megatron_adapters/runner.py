"""Fulfils the generator's model-runner contract with Megatron chunks and a key-value cache."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from chatlearn.generation.contract import DecodeRows, PromptChunk, SlotCopy
from megatron_adapters.decode_graph import DecodeGraphs
from megatron_adapters.generation_program import DenseProgram, StageProgram, build_program
from megatron_adapters.kv_cache import CacheView, KVCache, cache_dtype
from megatron_adapters.model_building import unwrap
from megatron_adapters.model_config import MegatronSettings
from megatron_adapters.parallel_state import ParallelGroups

__all__ = ["MegatronRunner"]

# Slots are as long as the longest sequence of a call, rounded up to this many tokens.
_LENGTH_STEP = 64


class MegatronRunner:
    """One causal language model, sharded over tensor and pipeline ranks.

    Every rank calls the same methods in lockstep. Hidden states go from stage to stage point to
    point; sampled tokens come back from the last stage by broadcast. The cache stays allocated
    from call to call, and grows when a call needs more.

    Args:
        chunks: from `build_model`.
        settings: Megatron's configuration objects.
        groups: of this rank.
        num_slots: sequences in flight; None: as many as there are, within `memory_share`.
        memory_share: of the memory of the device (of the machine, on a CPU), for the cache of each
            rank; heeded where `num_slots` is None.
        device: where the model lives.

    Attributes:
        program: the model's forward pass.
        graphs: on CUDA, decode steps as graphs, where one stage is the whole model and dense.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        settings: MegatronSettings,
        groups: ParallelGroups,
        *,
        num_slots: int | None,
        memory_share: float,
        device: torch.device,
    ) -> None:
        model = unwrap(chunks[0])
        self._groups = groups
        self._hidden_size = settings.transformer.hidden_size
        self._dtype = settings.transformer.params_dtype
        self._cache_dtype = cache_dtype(self._dtype, device)
        self._num_slots = num_slots
        self._memory_share = memory_share
        self.device = device
        self.max_length = settings.shape.max_sequence_length
        self.vocab_size = settings.shape.vocab_size
        self.is_sampling_rank = groups.is_last_stage
        layers = list(model.decoder.layers)
        attention = layers[0].self_attention
        self._layer_index = {layer.layer_number: at for at, layer in enumerate(layers)}
        self._num_heads = attention.num_query_groups_per_partition
        # Of latent attention, keys are longer than values.
        self._key_size = attention.key_hidden_size
        self._value_size = attention.val_hidden_size
        window = settings.transformer.window_size
        self._window = window[0] if window else None
        self._cache: KVCache | None = None
        self._most_rows: int | None = None
        with torch.inference_mode():
            self.program: StageProgram = build_program(model, self.max_length)
        self._parameters = list(model.parameters())
        self.graphs: DecodeGraphs | None = None
        is_whole = groups.pipeline.size() == 1
        if device.type == "cuda" and is_whole and isinstance(self.program, DenseProgram):
            self.graphs = DecodeGraphs(self.program, self._layer_index, window=self._window)

    @torch.inference_mode()
    def reserve(self, num_sequences: int, length: int) -> int:
        """See `ModelRunner.reserve`."""
        length = min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, self.max_length)
        self.program.prepare(num_sequences)
        limit = self._num_slots
        if limit is None:
            own = max(1, self._memory_bytes() // (self._token_bytes() * length) - 2)
            # Stages differ in layers.
            limit = self._least(own)
        num_slots = min(num_sequences, limit)
        # Stages may differ in kind, too; passes have as many rows in all of them.
        fills_rows = self._least(int(self.program.fills_rows))
        self._most_rows = num_slots if fills_rows else None
        cache = self._cache
        if cache is None or cache.num_slots < num_slots or cache.length < length:
            # The old one goes first, so that both are never there at once.
            self._cache = cache = None
            self._cache = KVCache(
                len(self._layer_index),
                num_slots,
                length,
                self._num_heads,
                self._key_size,
                self._value_size,
                dtype=self._cache_dtype,
                device=self.device,
            )
        if self.graphs is not None:
            addresses = tuple(parameter.data_ptr() for parameter in self._parameters)
            self.graphs.prepare(self._reserved(), addresses, num_slots, length)
        return num_slots

    @torch.inference_mode()
    def forward(
        self, chunks: Sequence[PromptChunk], rows: DecodeRows | None
    ) -> torch.Tensor | None:
        """See `ModelRunner.forward`."""
        if self.graphs is not None and rows is not None and not chunks:
            return self.graphs.decode(rows)[:, : self.vocab_size].float()
        view = CacheView.build(
            self._reserved(),
            self._layer_index,
            chunks,
            rows,
            self.device,
            window=self._window,
            most_rows=self._most_rows,
        )
        hidden = (
            self.program.embed(view)
            if self._groups.is_first_stage
            else self._receive(view.token_ids.shape[0])
        )
        hidden = self.program.run_layers(hidden, view)
        if not self._groups.is_last_stage:
            self._send(hidden)
            return None
        logits = self.program.compute_logits(hidden, view)
        return logits[: len(logits) - view.num_fill, : self.vocab_size].float()

    @torch.inference_mode()
    def copy_slots(self, copies: Sequence[SlotCopy]) -> None:
        """See `ModelRunner.copy_slots`."""
        self._reserved().copy(copies)

    def exchange_tokens(
        self, token_ids: torch.Tensor | None, logprobs: torch.Tensor | None, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ModelRunner.exchange_tokens`.

        The first rank's tokens count: tensor-parallel ranks sample alike, but not on their own.
        """
        tensor, pipeline = self._groups.tensor, self._groups.pipeline
        if token_ids is not None and logprobs is not None:
            if tensor.size() == 1 and pipeline.size() == 1:
                return token_ids, logprobs
            both = torch.stack([token_ids.double(), logprobs.double()])
        else:
            both = torch.empty((2, batch), dtype=torch.float64, device=self.device)
        if self.is_sampling_rank and tensor.size() > 1:
            dist.broadcast(both, src=dist.get_process_group_ranks(tensor)[0], group=tensor)
        if pipeline.size() > 1:
            dist.broadcast(both, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
        return both[0].long(), both[1].float()

    def _reserved(self) -> KVCache:
        if self._cache is None:
            raise RuntimeError("call reserve first: the cache has no slots yet")
        return self._cache

    def _memory_bytes(self) -> int:
        """This rank's share of the memory; of the whole, for what is free differs between runs."""
        if self.device.type == "cuda":
            cuda: Any = torch.cuda
            whole = int(cuda.get_device_properties(self.device).total_memory)
        else:
            whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return int(whole * self._memory_share)

    def _token_bytes(self) -> int:
        size = self._key_size + self._value_size
        numbers = len(self._layer_index) * self._num_heads * size
        return numbers * self._cache_dtype.itemsize

    def _least(self, number: int) -> int:
        """The smallest of the replica's ranks' numbers."""
        collectives: Any = dist
        least = torch.tensor(number, device=self.device)
        for group in (self._groups.tensor, self._groups.pipeline):
            if group.size() > 1:
                collectives.all_reduce(least, op=dist.ReduceOp.MIN, group=group)
        return int(least)

    def _receive(self, tokens: int) -> torch.Tensor:
        shape = (tokens, self._hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self.device)
        ranks = dist.get_process_group_ranks(self._groups.pipeline)
        dist.recv(hidden, ranks[self._groups.pipeline.rank() - 1], group=self._groups.pipeline)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        ranks = dist.get_process_group_ranks(self._groups.pipeline)
        following = ranks[self._groups.pipeline.rank() + 1]
        dist.send(hidden.contiguous(), following, group=self._groups.pipeline)
