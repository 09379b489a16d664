# pyright: standard, reportPrivateImportUsage=false
"""What the benchmark runs inside the Ray workers beside the sync itself.

Every function is called on all ranks of both models at once, with what it needs of the joint
process world that `join_joint_world` puts in place of the replica's own: nothing else communicates
in these workers any more, besides the sync over its own channel.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from chatlearn.parallel.sockets import open_store
from chatlearn.sync.digest import compute_digests, hash_tensors
from scripts.bench.sync_gather import FullParameter, is_whole, region_in_full

if TYPE_CHECKING:
    import torch

    from chatlearn.parallel.context import WorkerContext
    from chatlearn.parallel.sharding import TensorShard
    from chatlearn.sync.programs import Block

__all__ = [
    "JointWorld",
    "WorldAddress",
    "clear_weights",
    "count_differing",
    "forget_buffers",
    "forget_weights",
    "gather_broadcast",
    "host_joint_store",
    "join_joint_world",
    "joint_world",
    "keep_weights",
    "time_digests",
    "time_gloo",
    "time_memcpy",
]

_WORLD = "benchmark world"
_KEPT = "benchmark weights"
_SCRATCH = "benchmark scratch"
# Enough elements of a tensor to tell that it is not zero.
_SAMPLE = 4096


@dataclass(frozen=True)
class WorldAddress:
    """Where and how all ranks of both models meet.

    Attributes:
        host: of the store.
        port: of the store.
        size: ranks of both models, sources first.
        num_sources: how many of them are sources.
        timeout_s: of every message.
    """

    host: str
    port: int
    size: int
    num_sources: int
    timeout_s: float


class _Store:
    """The store that the first rank hosts."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self.store = open_store(host, timeout_s)

    def close(self) -> None:
        """Let go of the store."""
        del self.store


class JointWorld:
    """This rank's place in the joint world; a resource of its context.

    Attributes:
        rank: in the joint world; equal to the index of the endpoint.
        size: of the joint world.
        num_sources: ranks below this are sources.
        broadcasts: for each source the group of it and all destinations.
    """

    def __init__(self, address: WorldAddress, rank: int, store: Any) -> None:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("joint", store),
            rank=rank,
            world_size=address.size,
            timeout=timedelta(seconds=address.timeout_s),
        )
        self.rank = rank
        self.size = address.size
        self.num_sources = address.num_sources
        takers = range(address.num_sources, address.size)
        self.broadcasts: dict[int, Any] = {
            owner: dist.new_group([owner, *takers]) for owner in range(address.num_sources)
        }

    def close(self) -> None:
        """The worker itself leaves the world when it ends."""
        self.broadcasts.clear()


class _KeptWeights:
    """A copy of this rank's weights, to compare with."""

    def __init__(self, context: WorkerContext) -> None:
        live = _weights(context)
        self.tensors = {name: tensor.clone() for name, tensor in live.items()}

    def close(self) -> None:
        """Forget it."""
        self.tensors.clear()


class _Scratch:
    """Buffers that stay from one measurement to the next, so that all are warm."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def bytes(self, name: str, num_bytes: int) -> torch.Tensor:
        """A flat buffer of bytes; it grows to the largest size that was asked for."""
        import torch

        found = self._buffers.get(name)
        if found is None or found.numel() < num_bytes:
            found = self._buffers[name] = torch.ones(num_bytes, dtype=torch.uint8)
        return found[:num_bytes]

    def like(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A dense tensor in such a buffer."""
        import torch

        num_bytes = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
        return self.bytes(name, num_bytes).view(dtype).view(*shape)

    def close(self) -> None:
        """Forget the buffers."""
        self._buffers.clear()


def host_joint_store(context: WorkerContext) -> tuple[str, int]:
    """Open the store of the joint world in this worker; gives host and port."""
    kept = context.keep("benchmark store", lambda: _Store(context.host, context.timeout_s))
    return context.host, kept.store.port


def join_joint_world(context: WorkerContext, address: WorldAddress, rank: int) -> None:
    """Leave the replica's process world for one of all ranks of both models."""
    import torch.distributed as dist

    if rank == 0:
        hosted = context.keep("benchmark store", lambda: _Store(context.host, context.timeout_s))
        store = hosted.store
    else:
        timeout = timedelta(seconds=address.timeout_s)
        store = dist.TCPStore(address.host, address.port, None, False, timeout)
    context.keep(_WORLD, lambda: JointWorld(address, rank, store))


def joint_world(context: WorkerContext) -> JointWorld:
    """This rank's place in the joint world."""
    return context.keep(_WORLD, _missing_world)


def clear_weights(context: WorkerContext) -> None:
    """Zero a destination, so that only what comes next can make it right."""
    for tensor in _weights(context).values():
        tensor.zero_()


def keep_weights(context: WorkerContext) -> None:
    """Remember the weights as they are."""
    context.keep(_KEPT, lambda: _KeptWeights(context))


def forget_weights(context: WorkerContext) -> None:
    """Let go of the remembered weights."""
    context.drop(_KEPT)


def forget_buffers(context: WorkerContext) -> None:
    """Let go of the buffers of measurements."""
    context.drop(_SCRATCH)


def count_differing(context: WorkerContext) -> int:
    """Tensors whose bits are not the remembered ones, or that are zero."""
    import torch

    kept = context.keep(_KEPT, lambda: _KeptWeights(context)).tensors
    live = _weights(context)
    return sum(
        not torch.equal(live[name], tensor) or not bool(tensor.view(-1)[:_SAMPLE].any())
        for name, tensor in kept.items()
    )


def time_memcpy(context: WorkerContext, num_bytes: int) -> float:
    """Seconds of one single-threaded copy between two warm buffers."""
    import torch

    scratch = context.keep(_SCRATCH, _Scratch)
    given, taken = scratch.bytes("given", num_bytes), scratch.bytes("taken", num_bytes)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    start_s = time.perf_counter()
    taken.copy_(given)
    seconds = time.perf_counter() - start_s
    torch.set_num_threads(before)
    return seconds


def time_gloo(context: WorkerContext, pairs: Sequence[tuple[int, int]], num_bytes: int) -> float:
    """Seconds until what each pair sends, `num_bytes` in all, has come to this rank."""
    import torch.distributed as dist

    rank = joint_world(context).rank
    scratch = context.keep(_SCRATCH, _Scratch)
    share = num_bytes // len(pairs)
    own = [pair for pair in pairs if rank in pair]
    buffers = scratch.bytes("given", share * len(own)).view(len(own), share) if own else ()
    mine = list(zip(own, buffers, strict=True))
    dist.barrier()
    start_s = time.perf_counter()
    works = [
        dist.isend(buffer, pair[1]) if pair[0] == rank else dist.irecv(buffer, pair[0])
        for pair, buffer in mine
    ]
    for work in works:
        if work is not None:
            work.wait()
    return time.perf_counter() - start_s if mine else 0.0


def gather_broadcast(context: WorkerContext, parameters: Sequence[FullParameter]) -> None:
    """Bring every parameter to every destination by way of its owner."""
    import torch
    import torch.distributed as dist

    world = joint_world(context)
    live = _weights(context)
    scratch = context.keep(_SCRATCH, _Scratch)
    takers = range(world.num_sources, world.size)
    for parameter in parameters:
        parts = parameter.parts.get(world.rank, ())
        if world.rank != parameter.owner and world.rank not in takers:
            for shard in parts:
                dist.send(_region(shard, live).contiguous(), parameter.owner)
            continue
        own = parts or parameter.takers[world.rank]
        in_place = is_whole(own, parameter.num_elements)
        if in_place:
            full = live[own[0].local_name]
        else:
            full = scratch.like("full", parameter.shape, getattr(torch, parameter.dtype))
        if world.rank == parameter.owner and not in_place:
            _gather(parameter, live, full, scratch)
        dist.broadcast(full, parameter.owner, group=world.broadcasts[parameter.owner])
        if world.rank in takers and not in_place:
            for shard in own:
                _region(shard, live).copy_(full[region_in_full(shard)])


def time_digests(context: WorkerContext, blocks: Sequence[Block]) -> float:
    """Seconds that this rank's digests of one sync take."""
    import torch

    live = _weights(context)
    compute = hash_tensors if context.device.type == "cpu" else compute_digests
    start_s = time.perf_counter()
    compute(
        live[block.part.local_name][block.part.slices].to(getattr(torch, block.dtype))
        for block in blocks
    )
    return time.perf_counter() - start_s


def _gather(
    parameter: FullParameter,
    live: Mapping[str, torch.Tensor],
    full: torch.Tensor,
    scratch: _Scratch,
) -> None:
    """On the owner: its own parts, and those of its peers, into the full parameter."""
    import torch.distributed as dist

    for source, shards in parameter.parts.items():
        for shard in shards:
            region = full[region_in_full(shard)]
            if source == parameter.owner:
                region.copy_(_region(shard, live))
            elif region.is_contiguous():
                dist.recv(region, source)
            else:
                came = scratch.like("part", region.shape, region.dtype)
                dist.recv(came, source)
                region.copy_(came)


def _region(shard: TensorShard, live: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return live[shard.local_name][shard.local_slices()]


def _weights(context: WorkerContext) -> Mapping[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in context.module.weight_tensors().items()}


def _missing_world() -> JointWorld:
    raise RuntimeError("this worker has not joined the joint world")
