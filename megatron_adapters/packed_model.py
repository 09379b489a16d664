# pyright: standard, reportPrivateImportUsage=false
"""Megatron's GPTModel over packed streams, read only where something is asked of it."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from megatron_adapters.attention_plan import AttentionPlan
from megatron_adapters.kernels.availability import can_run_kernels
from megatron_adapters.packing import PackedBatch
from megatron_adapters.rotary import RotaryOptions, RotaryTables
from megatron_adapters.vocab_parallel import score_tokens

__all__ = ["PackedModel", "ScalarHead"]

# Logits that are alive at once; beyond it they are made in chunks, and again for the gradient.
_MOST_LOGIT_BYTES = 1 << 27
# The same where kernels read the logits as they are: nothing is as large beside them.
_MOST_LOGIT_BYTES_OF_KERNELS = 1 << 30


class ScalarHead(nn.Module):
    """One number per token: the head of value and reward models, in place of the output layer.

    The weight is whole on every tensor-parallel rank, and starts at zero.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [...] float32."""
        return nn.functional.linear(hidden.float(), self.weight.float()).squeeze(-1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight as a tensor that every rank holds whole."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        del metadata
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class PackedModel(GPTModel):
    """One chunk of a decoder.

    Embedding, layers and parameters are GPTModel's; what runs before and after them is not. The
    rotary angles of a stream are looked up once and serve all layers. The last stage computes
    scores for the tokens that are read, in chunks, never logits for a whole batch.

    Args:
        real_vocab_size: tokens; the padding beyond them counts as impossible.
        has_scalar_head: one number per token instead of logits.
        rotary: of the positions, where the model has rotary ones.
        embedding_scale: factor of the embeddings; None: 1.
        options: GPTModel's.
    """

    def __init__(
        self,
        *,
        real_vocab_size: int,
        has_scalar_head: bool,
        rotary: RotaryOptions,
        embedding_scale: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.rotary = rotary
        self.is_adapted = False
        self.embedding_scale: float | None = None
        if embedding_scale is not None:
            # Rounded as the embeddings are.
            self.embedding_scale = torch.tensor(
                embedding_scale, dtype=self.config.params_dtype
            ).item()
        self.real_vocab_size = real_vocab_size
        self.has_scalar_head = has_scalar_head
        self._tables: RotaryTables | None = None
        if not self.post_process:
            return
        layer: Any = self.output_layer
        if has_scalar_head:
            self.output_layer = ScalarHead(self.config)
        elif self.config.sequence_parallel:
            # The head gets tokens of the whole stream, which are gathered before it.
            layer.sequence_parallel = False
            layer.allreduce_dgrad = self.config.tensor_model_parallel_size > 1

    def forward(self, batch: PackedBatch) -> torch.Tensor:  # type: ignore[override]
        """Run one micro-batch.

        Returns:
            On the last stage float32, [2, rows, longest response] log-probabilities and entropies
            of a language model (entropies only where gradients are wanted), or [1, *grid_shape]
            values; elsewhere the hidden states [tokens, 1, hidden].
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=batch.token_ids, position_ids=batch.position_ids)
            if self.embedding_scale is not None:
                hidden = hidden * self.embedding_scale
            if self.is_adapted and torch.is_grad_enabled():
                # Layers that are computed again for the gradient ask their input for one, which
                # frozen embeddings do not have.
                hidden.requires_grad_()
        hidden = self.decoder(
            hidden_states=hidden,
            attention_mask=None,
            packed_seq_params=self._with_rotary(batch),  # type: ignore[arg-type]
            padding_mask=self._find_fill(batch),
        )
        return self._read(hidden, batch) if self.post_process else hidden

    def _find_fill(self, batch: PackedBatch) -> torch.Tensor | None:
        """[1, tokens of this rank] bool: what does not count for the balance of experts."""
        if self.config.num_moe_experts is None or not torch.is_grad_enabled():
            return None
        if not self.config.sequence_parallel:
            return batch.is_fill
        group = self.pg_collection.tp
        return batch.is_fill.chunk(group.size(), dim=1)[group.rank()]

    def _with_rotary(self, batch: PackedBatch) -> AttentionPlan:
        if self._tables is None:
            self._tables = self.build_rotary(self.max_sequence_length, batch.token_ids.device)
        if self._tables is None:
            return batch.plan
        positions = batch.position_ids[0]
        cos, sin = self._tables.turns_at(positions)
        plan = replace(batch.plan, cos=cos, sin=sin)
        local = self._tables.local_turns_at(positions)
        return plan if local is None else replace(plan, local_cos=local[0], local_sin=local[1])

    def build_rotary(self, length: int, device: torch.device) -> RotaryTables | None:
        """The angles of all positions; None where the model has no rotary positions.

        Args:
            length: positions.
            device: where the angles lie.
        """
        config: Any = self.config
        if config.multi_latent_attention:
            return self.rotary.build_tables(config.qk_pos_emb_head_dim, length, device)
        rotary = getattr(self, "rotary_pos_emb", None)
        if rotary is None:
            return None
        return self.rotary.build_tables(2 * len(rotary.inv_freq), length, device)

    def _read(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        # Ranks without reads take part in the collectives with a token that counts for nothing.
        reads = batch.reads if len(batch.reads) else batch.reads.new_zeros(1)
        read = functional.embedding(reads, hidden.squeeze(1))
        if self.has_scalar_head:
            results = self.output_layer(read)[None]
        else:
            results = self._score(read, batch)
        rows, width = batch.grid_shape
        empty = results.new_zeros((len(results), rows * width))
        grid = empty.index_copy(1, batch.places, results[:, : len(batch.places)])
        if not len(batch.places):
            grid = grid + 0.0 * results.sum()
        context = self.cp_group
        if context is not None and context.size() > 1:
            # Each rank has the scores of its tokens; gradients go back to where they came from.
            grid = reduce_from_tensor_model_parallel_region(grid, group=context)
        return grid.view(-1, rows, width)

    def _score(self, hidden: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        """[1 or 2, reads] of the read hidden states [reads, hidden]."""
        targets = batch.targets if len(batch.targets) else batch.targets.new_zeros(1)
        share = self.vocab_size // self.config.tensor_model_parallel_size
        limit = _MOST_LOGIT_BYTES
        if can_run_kernels(hidden):
            limit = _MOST_LOGIT_BYTES_OF_KERNELS
        most = max(1, limit // (4 * share))
        if len(hidden) <= most:
            return self._score_chunk(hidden, targets, batch.temperature)
        parts: list[Any] = []
        for some, wanted in zip(hidden.split(most), targets.split(most), strict=True):
            if torch.is_grad_enabled():
                parts.append(
                    checkpoint(
                        self._score_chunk,
                        some,
                        wanted,
                        batch.temperature,
                        use_reentrant=False,
                        preserve_rng_state=False,
                    )
                )
            else:
                parts.append(self._score_chunk(some, wanted, batch.temperature))
        return torch.cat(parts, dim=1)

    def _score_chunk(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        weight = None
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        logits, _ = self.output_layer(hidden[:, None], weight=weight)
        scores = score_tokens(
            logits[:, 0],
            targets,
            vocab_size=self.real_vocab_size,
            temperature=temperature,
            group=self.pg_collection.tp,
            has_entropy=torch.is_grad_enabled(),
        )
        if scores.entropy is None:
            return scores.logprobs[None]
        return torch.stack([scores.logprobs, scores.entropy])
