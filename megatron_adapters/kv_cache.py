"""Keys and values of the sequences that are being generated, by layer and slot."""

from dataclasses import dataclass

import torch

__all__ = ["CacheView", "KVCache"]


class KVCache:
    """Preallocated keys and values of this rank's layers and key-value heads.

    Args:
        num_layers: layers of this rank (all model chunks together).
        num_slots: sequences in flight.
        max_length: tokens of a slot.
        num_heads: key-value heads of this rank.
        head_size: length of a head.
        dtype: of keys and values.
        device: where they lie.
    """

    def __init__(
        self,
        num_layers: int,
        num_slots: int,
        max_length: int,
        num_heads: int,
        head_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, num_slots, num_heads, max_length, head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class CacheView:
    """What one forward pass reads and writes; stands in for the attention mask.

    Attributes:
        cache: of this rank.
        slots: [batch] int64.
        positions: [batch, tokens] int64, where each new token goes in its slot.
        layer_index: cache layer of each of Megatron's layer numbers.
        mask: [batch, 1, tokens, length] bool; True where a new token may look.
        length: longest prefix in the batch, the new tokens included.
    """

    cache: KVCache
    slots: torch.Tensor
    positions: torch.Tensor
    layer_index: dict[int, int]
    mask: torch.Tensor
    length: int

    @classmethod
    def build(
        cls,
        cache: KVCache,
        slots: torch.Tensor,
        positions: torch.Tensor,
        layer_index: dict[int, int],
    ) -> "CacheView":
        """View for new tokens at `positions`; each sees its slot's tokens up to itself."""
        length = int(positions.max()) + 1
        keys = torch.arange(length, device=positions.device)
        mask = keys[None, None, None, :] <= positions[:, None, :, None]
        return cls(cache, slots, positions, layer_index, mask, length)

    def extend(
        self, layer_number: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the new tokens' keys and values; gives those of the whole prefixes.

        Args:
            layer_number: Megatron's, counted from 1 over the whole model.
            keys: [batch, heads, tokens, size].
            values: [batch, heads, tokens, size].

        Returns:
            Keys and values, [batch, heads, length, size] each.
        """
        layer = self.layer_index[layer_number]
        all_keys, all_values = self.cache.keys[layer], self.cache.values[layer]
        slots = self.slots[:, None]
        all_keys[slots, :, self.positions] = keys.transpose(1, 2)
        all_values[slots, :, self.positions] = values.transpose(1, 2)
        return all_keys[self.slots, :, : self.length], all_values[self.slots, :, : self.length]
