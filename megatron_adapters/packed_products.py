"""Products with weights that were laid out for the processor's bfloat16 units beforehand.

oneDNN otherwise lays a weight out anew for every product, which counts for the few rows of a
decoding step. For each number of rows that it has not seen it compiles a program, which takes
longer than the product: few different numbers should come up. A copy of the weights is kept for
that; whoever changes weights has to call `prepare` before the next product.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn import functional

from megatron_adapters.precision import has_native_bf16

__all__ = ["PackedProducts"]


class PackedProducts:
    """`linear` on prepared weights, and as ever on all others."""

    def __init__(self) -> None:
        self._packed: dict[int, torch.Tensor] = {}

    def prepare(self, weights: Iterable[torch.Tensor], num_rows: int) -> None:
        """Lay weights out for products with about so many rows; forgets those before.

        Only bfloat16 on a processor that multiplies it is worth that.

        Args:
            weights: [output, input] each; they have to live as long as they are used here.
            num_rows: of the usual product.
        """
        self._packed.clear()
        if not _can_pack():
            return
        ops: Any = torch.ops.mkldnn
        for weight in weights:
            if weight.device.type == "cpu" and weight.dtype == torch.bfloat16:
                self._packed[id(weight)] = ops._reorder_linear_weight(weight.detach(), num_rows)  # noqa: SLF001

    @property
    def is_packed(self) -> bool:
        """Whether there are prepared weights."""
        return bool(self._packed)

    def linear(
        self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`rows weight^T + bias`; [rows, input] to [rows, output]."""
        packed = self._packed.get(id(weight))
        if packed is None:
            return functional.linear(rows, weight, bias)
        ops: Any = torch.ops.mkldnn
        return ops._linear_pointwise(rows, packed, bias, "none", [], "")  # noqa: SLF001


def _can_pack() -> bool:
    ops: Any = torch.ops.mkldnn
    has_ops = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and has_ops and has_native_bf16("cpu")
