"""Fulfils the generator's model-runner contract with Megatron chunks and a key-value cache."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_adapters.kv_cache import CacheView, KVCache
from megatron_adapters.model_building import unwrap
from megatron_adapters.model_config import MegatronSettings
from megatron_adapters.parallel_state import ParallelGroups

__all__ = ["MegatronRunner"]


class MegatronRunner:
    """One causal language model, sharded over tensor and pipeline ranks.

    Every rank calls the same methods in lockstep. Hidden states go from stage to stage point to
    point; sampled tokens come back from the last stage by broadcast.

    Args:
        chunks: from `build_model`.
        settings: Megatron's configuration objects.
        groups: of this rank.
        num_slots: sequences in flight.
        device: where the model lives.
    """

    def __init__(
        self,
        chunks: Sequence[Any],
        settings: MegatronSettings,
        groups: ParallelGroups,
        *,
        num_slots: int,
        device: torch.device,
    ) -> None:
        self._model = unwrap(chunks[0])
        self._groups = groups
        self._device = device
        self._hidden_size = settings.transformer.hidden_size
        self._dtype = settings.transformer.params_dtype
        self._rotary = getattr(self._model, "rotary_pos_emb", None)
        self.num_slots = num_slots
        self.max_length = settings.shape.max_sequence_length
        self.vocab_size = settings.shape.vocab_size
        self.is_sampling_rank = groups.is_last_stage
        layers = list(self._model.decoder.layers)
        attention = layers[0].self_attention
        self._layer_index = {layer.layer_number: at for at, layer in enumerate(layers)}
        self._cache = KVCache(
            len(layers),
            num_slots,
            self.max_length,
            attention.num_query_groups_per_partition,
            attention.hidden_size_per_attention_head,
            dtype=self._dtype,
            device=device,
        )

    @torch.no_grad()
    def prefill(
        self, slots: torch.Tensor, token_ids: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor | None:
        """See `ModelRunner.prefill`."""
        positions = torch.arange(token_ids.shape[1]).expand_as(token_ids)
        return self._forward(slots, token_ids, positions, lengths - 1)

    @torch.no_grad()
    def decode(
        self, slots: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor | None:
        """See `ModelRunner.decode`."""
        last = torch.zeros_like(positions)
        return self._forward(slots, token_ids[:, None], positions[:, None], last)

    def exchange_tokens(
        self, token_ids: torch.Tensor | None, logprobs: torch.Tensor | None, batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `ModelRunner.exchange_tokens`.

        The first rank's tokens count: tensor-parallel ranks sample alike, but not on their own.
        """
        both = torch.zeros((2, batch), dtype=torch.float64)
        if token_ids is not None and logprobs is not None:
            both = torch.stack([token_ids.double(), logprobs.double()]).cpu()
        both = both.to(self._device)
        if self.is_sampling_rank and self._groups.tensor.size() > 1:
            first = dist.get_process_group_ranks(self._groups.tensor)[0]
            dist.broadcast(both, src=first, group=self._groups.tensor)
        if self._groups.pipeline.size() > 1:
            last = dist.get_process_group_ranks(self._groups.pipeline)[-1]
            dist.broadcast(both, src=last, group=self._groups.pipeline)
        both = both.cpu()
        return both[0].long(), both[1].float()

    def _forward(
        self,
        slots: torch.Tensor,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
    ) -> torch.Tensor | None:
        """Run new tokens through this stage.

        Args:
            slots: [batch] int64.
            token_ids: [batch, tokens] int64.
            positions: [batch, tokens] int64.
            last: [batch] int64, index of the token whose logits are wanted.
        """
        token_ids, positions = token_ids.to(self._device), positions.to(self._device)
        slots, last = slots.to(self._device), last.to(self._device)
        batch, tokens = token_ids.shape
        hidden = None
        if self._groups.is_first_stage:
            hidden = self._model.embedding(input_ids=token_ids, position_ids=positions)
        else:
            self._model.decoder.set_input_tensor(self._receive(tokens, batch))
        view = CacheView.build(self._cache, slots, positions, self._layer_index)
        hidden = self._model.decoder(
            hidden_states=hidden,
            attention_mask=view,
            rotary_pos_emb=self._rotary_of(positions),
        )
        if not self._groups.is_last_stage:
            self._send(hidden)
            return None
        return self._logits(hidden[last, torch.arange(batch, device=self._device)])

    def _rotary_of(self, positions: torch.Tensor) -> torch.Tensor | None:
        """Rotary angles of each row's own positions: [tokens, batch, 1, size]."""
        if self._rotary is None:
            return None
        table = self._rotary(self.max_length)
        return table[positions.t(), 0]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[batch, hidden] to [batch, vocab] float32, the same on every tensor-parallel rank."""
        weight = None
        if self._model.share_embeddings_and_output_weights:
            weight = self._model.shared_embedding_or_output_weight()
        logits, _ = self._model.output_layer(
            hidden[None], weight=weight, runtime_gather_output=True
        )
        return logits[0, :, : self.vocab_size].float()

    def _receive(self, tokens: int, batch: int) -> torch.Tensor:
        shape = (tokens, batch, self._hidden_size)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
        ranks = dist.get_process_group_ranks(self._groups.pipeline)
        dist.recv(hidden, ranks[self._groups.pipeline.rank() - 1], group=self._groups.pipeline)
        return hidden

    def _send(self, hidden: torch.Tensor) -> None:
        ranks = dist.get_process_group_ranks(self._groups.pipeline)
        following = ranks[self._groups.pipeline.rank() + 1]
        dist.send(hidden.contiguous(), following, group=self._groups.pipeline)
