"""Keys and values of the sequences that are being generated, by layer and slot.

A forward pass runs over packed tokens: first one for each slot that decodes (the slots from 0 on,
so the cache is read through views), then the chunks of prompts. `CacheView` says for one pass what
each token sees; Megatron's attention core gets it in place of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch.nn import functional

from chatlearn.generation.contract import DecodeRows, PromptChunk, SlotCopy
from megatron_adapters.huge_pages import ask_for_huge_pages
from megatron_adapters.masked_attention import attend_fused
from megatron_adapters.packed_chunks import ChunkGroup, PackedChunks

__all__ = ["CacheView", "KVCache", "cache_dtype", "fill_up"]

# Batches are filled up to a power of 2 below the first, to a multiple of it above.
_ROWS_STEP = 16

Turns = tuple[torch.Tensor | None, torch.Tensor | None]


def cache_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the cache of a model that computes in `dtype`.

    On a CPU the products with cached keys and values are float32: a step reads them all, and would
    otherwise turn them all into float32 first, which takes longer than reading twice the bytes.
    """
    return torch.float32 if device.type == "cpu" and dtype == torch.bfloat16 else dtype


def fill_up(count: int) -> int:
    """Rows of a batch whose size is one of a few."""
    if count >= _ROWS_STEP:
        return -(-count // _ROWS_STEP) * _ROWS_STEP
    return 1 << (count - 1).bit_length()


class KVCache:
    """Preallocated keys and values of this rank's layers and key-value heads.

    Two slots more than asked for: in the first the generator keeps a prompt, in the second go the
    tokens that only fill up a batch.

    Args:
        num_layers: layers of this rank.
        num_slots: sequences in flight.
        length: tokens of a slot.
        num_heads: key-value heads of this rank.
        key_size: length of a head's keys.
        value_size: length of its values.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        length: int,
        num_heads: int,
        key_size: int,
        value_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        self.length = length
        shape = (num_layers, num_slots + 2, num_heads, length)
        # Zeros, for what a mask hides still takes part with weight 0, and must be finite.
        self._all = [_allocate((*shape, size), dtype, device) for size in (key_size, value_size)]
        self.keys, self.values = (list(both) for both in self._all)

    def copy(self, copies: Sequence[SlotCopy]) -> None:
        """Copy between slots, one after the other."""
        for copy in copies:
            end = copy.target + copy.num_targets
            for held in self._all:
                source = held[:, copy.source : copy.source + 1, :, : copy.length]
                held[:, copy.target : end, :, : copy.length] = source


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu":
        ask_for_huge_pages(tensor)
    return tensor.zero_()


@dataclass(frozen=True)
class CacheView:
    """What one forward pass reads and writes.

    Attributes:
        cache: of this rank.
        layer_index: cache layer of each of Megatron's layer numbers.
        token_ids: [packed] int64.
        positions: [packed] int64, where each token goes in its slot.
        slots: [packed] int64.
        num_rows: tokens that decode; they come first, for the slots from 0 on.
        num_fill: the last of these, which only fill up the batch.
        longest: keys that the longest of these sees.
        column: the position of all of these, if it is the same.
        groups: the chunks, in the order of their tokens.
        wanted: places of the tokens whose logits are wanted; None: all.
        window: in layers with a sliding window, how many earlier tokens one sees; None: there are
            no such layers.
        turns: cosines and sines of rotary positions that the layers shall apply, [packed, 1, 1,
            pairs] float32 each; None: they have been applied.
        local_turns: the same for layers with a sliding window.
    """

    cache: KVCache
    layer_index: dict[int, int]
    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    num_rows: int
    longest: int
    column: int | None
    groups: tuple[ChunkGroup, ...]
    wanted: torch.Tensor | None
    window: int | None = None
    num_fill: int = 0
    turns: Turns = (None, None)
    local_turns: Turns = (None, None)

    @classmethod
    def build(
        cls,
        cache: KVCache,
        layer_index: dict[int, int],
        chunks: Sequence[PromptChunk],
        rows: DecodeRows | None,
        device: torch.device,
        *,
        window: int | None = None,
        most_rows: int | None = None,
    ) -> CacheView:
        """View of a pass.

        Args:
            cache: of this rank.
            layer_index: cache layer of each of Megatron's layer numbers.
            chunks: of prompts.
            rows: that decode.
            device: of the tokens.
            window: see the attributes.
            most_rows: fill up to one of a few numbers of rows, and at most so many, where there are
                no chunks; None: do not. It must not follow from the cache, which may be larger
                than a call needs: how products round may depend on it.
        """
        if most_rows is not None and rows is not None and not chunks:
            return cls._of_filled(cache, layer_index, rows, window, most_rows)
        num_rows = 0 if rows is None else rows.token_ids.shape[0]
        packed = PackedChunks.build(chunks, num_rows, device)
        longest, column = 0, None
        if rows is None:
            token_ids, positions, slots = packed.token_ids, packed.positions, packed.slots
        else:
            token_ids, positions = rows.token_ids, rows.positions
            slots = torch.arange(num_rows, device=device)
            longest = rows.longest
            if rows.is_even:
                column = longest - 1
            if chunks:
                token_ids = torch.cat([token_ids, packed.token_ids])
                positions = torch.cat([positions, packed.positions])
                slots = torch.cat([slots, packed.slots])
        wanted = None
        if chunks:
            places = torch.tensor(packed.wanted, dtype=torch.int64, device=device)
            wanted = torch.cat([torch.arange(num_rows, device=device), places])
        return cls(
            cache,
            layer_index,
            token_ids,
            positions,
            slots,
            num_rows,
            longest,
            column,
            packed.groups,
            wanted,
            window,
        )

    @classmethod
    def _of_filled(
        cls,
        cache: KVCache,
        layer_index: dict[int, int],
        rows: DecodeRows,
        window: int | None,
        most_rows: int,
    ) -> CacheView:
        count = rows.token_ids.shape[0]
        size = max(count, min(fill_up(count), most_rows))
        slots = torch.arange(size, device=rows.token_ids.device)
        slots[count:] = cache.num_slots + 1
        missing = (0, size - count)
        token_ids, positions = (
            functional.pad(t, missing) if size > count else t
            for t in (rows.token_ids, rows.positions)
        )
        view = cls.of_rows(
            cache, layer_index, token_ids, positions, slots, rows.longest, window=window
        )
        column = rows.longest - 1 if rows.is_even else None
        return replace(view, column=column, num_fill=size - count)

    @classmethod
    def of_rows(
        cls,
        cache: KVCache,
        layer_index: dict[int, int],
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        longest: int,
        *,
        window: int | None = None,
    ) -> CacheView:
        """View of a pass of decoding rows only, whose shapes depend on nothing but the arguments'.

        Row i reads slot i; it writes to `slots[i]`, which is another for rows that only fill up.
        """
        count = token_ids.shape[0]
        return cls(
            cache,
            layer_index,
            token_ids,
            positions,
            slots,
            count,
            longest,
            None,
            (),
            None,
            window,
        )

    @property
    def decodes_only(self) -> bool:
        """Whether each token is one of a row that decodes."""
        return not self.groups

    def layer_cache(self, layer_number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, [slots, groups, length, size] each.

        Args:
            layer_number: Megatron's, counted from 1 over the whole model.
        """
        layer = self.layer_index[layer_number]
        return self.cache.keys[layer], self.cache.values[layer]

    def attend(
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None,
        *,
        is_windowed: bool = False,
    ) -> torch.Tensor:
        """Write the new keys and values, and attend to those of the whole prefixes.

        Args:
            layer_number: Megatron's, counted from 1 over the whole model.
            query: [packed, groups, heads of a group, size].
            key: [packed, groups, size].
            value: [packed, groups, value size].
            scale: factor of the scores; None: 1 / sqrt(size).
            is_windowed: the layer has a sliding window.

        Returns:
            [packed, heads * value size].
        """
        keys, values = self.layer_cache(layer_number)
        self._write(keys, key)
        self._write(values, value)
        count = self.num_rows
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        seen = self._window_rows if is_windowed else self._rows
        if not self.groups:
            return self._attend_rows(query, keys, values, factor, seen)
        parts = [self._attend_rows(query[:count], keys, values, factor, seen)] if count else []
        for number, group in enumerate(self.groups):
            at = slice(group.first, group.first + group.num_chunks * group.tokens)
            mask = self._window_masks[number] if is_windowed else group.mask
            parts.append(
                _attend_chunks(group, mask, query[at], key[at], value[at], keys, values, factor)
            )
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @cached_property
    def _rows(self) -> _SeenKeys:
        keys = self.cache.keys[0]
        bias = None
        if self.column is None:
            positions = self.positions[: self.num_rows]
            bias = row_bias(positions, self.longest, keys.dtype)
            held = self.num_rows - self.num_fill
            if held and keys.device.type == "cpu":
                shortest = 1 + int(positions[:held].min())
                return _SeenKeys(0, self.longest, bias, shortest)
        return _SeenKeys(0, self.longest, bias)

    @cached_property
    def _window_rows(self) -> _SeenKeys:
        """What rows see of their slots in layers with a sliding window."""
        window = self.window
        if window is None or self.longest <= window + 1:
            return self._rows
        if self.column is not None:
            return _SeenKeys(self.column - window, self.longest, None)
        positions = self.positions[: self.num_rows]
        bias = row_bias(positions, self.longest, self.cache.keys[0].dtype, window)
        return _SeenKeys(0, self.longest, bias)

    @cached_property
    def _window_masks(self) -> list[torch.Tensor | None]:
        """The masks of the chunks in layers with a sliding window."""
        device = self.token_ids.device
        return [_window_mask(group, self.window, device) for group in self.groups]

    def _write(self, cached: torch.Tensor, new: torch.Tensor) -> None:
        count = self.num_rows
        if self.column is not None:
            held = count - self.num_fill
            cached[:held, :, self.column] = new[:held]
            new = new[count:]
        if len(new):
            size = cached.shape[-1]
            rows = new.to(cached.dtype).reshape(-1, size)
            cached.view(-1, size).index_copy_(0, self._places, rows)

    @cached_property
    def _places(self) -> torch.Tensor:
        """[tokens * groups] int64, rows of a layer's cache for what `column` does not place."""
        first = self.num_rows if self.column is not None else 0
        _, groups, length, _ = self.cache.keys[0].shape
        group = torch.arange(groups, device=self.slots.device)
        slots = self.slots[first:, None] * groups + group
        return (slots * length + self.positions[first:, None]).flatten()

    def _attend_rows(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
        seen: _SeenKeys,
    ) -> torch.Tensor:
        """One token a slot; the query heads of a group are rows of one product with its keys."""
        count, groups, heads, size = query.shape
        if keys.dtype != torch.float32 or query.device.type != "cpu":
            keys, values = (t[:count, :, seen.first : seen.stop] for t in (keys, values))
            context = functional.scaled_dot_product_attention(
                query, keys, values, attn_mask=seen.bias, scale=scale
            )
            return context.reshape(count, -1)
        # On a CPU plain products take less time than torch's kernel for one token.
        rows = query.float().reshape(count * groups, heads, size)
        keys = seen.of(keys, count).transpose(1, 2)
        scores = torch.baddbmm(rows.new_empty(()), rows, keys, beta=0, alpha=scale)
        if seen.bias is not None:
            # What is hidden lies behind the shortest prefix; a bias of the product would cost more.
            hidden = scores.view(count, groups, heads, -1)[..., seen.first_hidden :]
            hidden += seen.bias[..., seen.first_hidden :]
        context = torch.bmm(scores.softmax(-1), seen.of(values, count))
        return context.view(count, -1).to(query.dtype)


@dataclass(frozen=True)
class _SeenKeys:
    """Which keys of its slot a decoding row looks at.

    Attributes:
        first: position of the first key of all rows.
        stop: position after the last.
        bias: [rows, 1, 1, keys], 0 where a row may look, else -inf; None: everywhere.
        first_hidden: the first key that any row must not look at; rows that only fill up may.
    """

    first: int
    stop: int
    bias: torch.Tensor | None
    first_hidden: int = 0

    def of(self, cached: torch.Tensor, count: int) -> torch.Tensor:
        """[count * groups, keys, size], a view of the first slots' keys or values of a layer.

        One call, for this happens in every layer of every step.
        """
        _, group, token, _ = cached.stride()
        # Slots lie side by side, and so do the groups of a slot.
        shape = (count * cached.shape[1], self.stop - self.first, cached.shape[3])
        offset = cached.storage_offset() + self.first * token
        return cached.as_strided(shape, (group, token, 1), offset)


def row_bias(
    positions: torch.Tensor, longest: int, dtype: torch.dtype, window: int | None = None
) -> torch.Tensor:
    """[rows, 1, 1, longest], 0 up to each row's position (and not beyond a window), else -inf."""
    keys = torch.arange(longest, device=positions.device)
    is_hidden = keys > positions[:, None]
    if window is not None:
        is_hidden |= keys < positions[:, None] - window
    bias = torch.zeros(is_hidden.shape, dtype=dtype, device=positions.device)
    return bias.masked_fill_(is_hidden, float("-inf"))[:, None, None]


def _window_mask(
    group: ChunkGroup, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """[tokens, start + tokens] bool, True where a token may look; None: causal."""
    end = group.start + group.tokens
    if window is None or end <= window + 1:
        return group.mask
    mask = torch.ones((group.tokens, end), dtype=torch.bool, device=device)
    return mask.tril(group.start).triu(group.start - window)


def _attend_chunks(
    group: ChunkGroup,
    mask: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """[chunks * tokens, heads * value size]; chunks at their prompt's beginning need no cache."""
    shape = (group.num_chunks, group.tokens)
    num_groups, heads, size = query.shape[1:]
    query = query.reshape(*shape, num_groups * heads, size).transpose(1, 2)
    if group.start:
        end = group.start + group.tokens
        key = keys[group.slot : group.slot + 1, :, :end].to(query.dtype)
        value = values[group.slot : group.slot + 1, :, :end].to(query.dtype)
    else:
        key = key.reshape(*shape, num_groups, size).transpose(1, 2)
        value = value.reshape(*shape, num_groups, -1).transpose(1, 2)
    context = attend_fused(query, key, value, mask, scale=scale)
    return context.transpose(1, 2).reshape(shape[0] * shape[1], -1)
