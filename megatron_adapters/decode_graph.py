# pyright: standard, reportPrivateImportUsage=false
"""Decode steps as CUDA graphs: one launch a step instead of a dozen a layer.

A graph has fixed shapes and addresses. So the rows are filled up to one of a few batch sizes (the
rows that fill up write to a slot of their own), the cache is read to one of a few lengths, inputs
are copied to fixed buffers, and a graph is recorded when its size first comes up. A new cache or
weights at new addresses drop all graphs. All of it runs on the rank's current stream.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_adapters.kv_cache import CacheView, KVCache, fill_up

if TYPE_CHECKING:
    from chatlearn.generation.contract import DecodeRows
    from megatron_adapters.generation_program import StageProgram

__all__ = ["DecodeGraphs"]

_LENGTH_STEP = 256


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor


class DecodeGraphs:
    """Decode steps of a model that is whole in one pipeline stage.

    Args:
        program: without host synchronisation in its passes.
        layer_index: cache layer of each of Megatron's layer numbers.
        window: of layers with a sliding window, see `CacheView`.
        is_recorded: False: the same filled-up passes, but not as graphs (any device).
    """

    def __init__(
        self,
        program: StageProgram,
        layer_index: dict[int, int],
        *,
        window: int | None = None,
        is_recorded: bool = True,
    ) -> None:
        self._program = program
        self._layer_index = layer_index
        self._window = window
        self._is_recorded = is_recorded
        self._cache: KVCache | None = None
        self._num_slots = self._length = 0
        self._addresses: tuple[int, ...] = ()
        self._graphs: dict[tuple[int, int], _Recorded] = {}
        self._inputs = torch.empty((3, 0), dtype=torch.int64)

    def prepare(
        self, cache: KVCache, addresses: tuple[int, ...], num_slots: int, length: int
    ) -> None:
        """Use this cache and the weights at these addresses; called before each generation.

        Args:
            cache: as large as this call needs, or larger from a call before.
            addresses: of the weights.
            num_slots: that this call needs.
            length: of each, tokens.
        """
        self._num_slots, self._length = num_slots, length
        if cache is self._cache and addresses == self._addresses:
            return
        self._graphs.clear()
        self._cache, self._addresses = cache, addresses
        # Token, position and slot of each row.
        shape = (3, cache.num_slots)
        self._inputs = torch.zeros(shape, dtype=torch.int64, device=cache.keys[0].device)

    def decode(self, rows: DecodeRows) -> torch.Tensor:
        """[rows, padded vocabulary] logits, overwritten by the next call."""
        cache = self._cache
        if cache is None:
            raise RuntimeError("call prepare first: there is no cache yet")
        count = len(rows.token_ids)
        size = min(fill_up(count), self._num_slots)
        length = min(-(-rows.longest // _LENGTH_STEP) * _LENGTH_STEP, self._length)
        token_ids, positions, slots = self._inputs
        token_ids[:count] = rows.token_ids
        positions[:count] = rows.positions
        positions[count:size] = 0
        torch.arange(size, out=slots[:size])
        slots[count:size] = cache.num_slots + 1
        if not self._is_recorded:
            return self._run(cache, size, length)[:count]
        recorded = self._graphs.get((size, length))
        if recorded is None:
            recorded = self._graphs[size, length] = self._record(cache, size, length)
        recorded.graph.replay()
        return recorded.logits[:count]

    def _run(self, cache: KVCache, size: int, length: int) -> torch.Tensor:
        token_ids, positions, slots = self._inputs[:, :size]
        view = CacheView.of_rows(
            cache, self._layer_index, token_ids, positions, slots, length, window=self._window
        )
        hidden = self._program.run_layers(self._program.embed(view), view)
        return self._program.compute_logits(hidden, view)

    def _record(self, cache: KVCache, size: int, length: int) -> _Recorded:
        """Record a pass; running it before, as CUDA asks for, writes what the replay writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._run(cache, size, length)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((recorded.graph.pool() for recorded in self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=pool):
            logits = self._run(cache, size, length)
        return _Recorded(graph, logits)
