"""What runs inside the workers during a weight sync; the driver calls these in phases.

0. `pull_early` on every destination, where all weights are pulled and every source is known from
   the sync before: copies while the sources still prepare their offers.
1. `offer_weights` on every source: its tensors are checked, shared, and digested.
2. `exchange_weights` on every rank with steps on the channel.
3. `offer_weights` again on destinations that others pull from.
4. `pull_weights` on every destination: copies out of what is offered, and compares digests.
5. `commit_weights` on every destination, in the mode `double`.

The sources stand still meanwhile: a worker runs one call at a time, and the driver starts no other.
What is kept from one sync to the next are resources of the worker's context.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chatlearn.errors import SyncError
from chatlearn.sync.channel import Channel
from chatlearn.sync.digest import compute_digest, has_equal_bits
from chatlearn.sync.programs import NUM_TURNS, Block, Part, Pull, RankProgram
from chatlearn.sync.records import Endpoint
from chatlearn.sync.shared_memory import OpenedTensors, SharedTensors, TensorHandle

if TYPE_CHECKING:
    import torch

    from chatlearn.parallel.context import WorkerContext

__all__ = [
    "Offer",
    "SyncCall",
    "commit_weights",
    "describe_endpoint",
    "exchange_weights",
    "install_programs",
    "is_shareable",
    "offer_weights",
    "pull_early",
    "pull_weights",
    "spoil_weights",
]

# More threads than this no longer copy faster.
_MOST_THREADS = 8


@dataclass(frozen=True)
class SyncCall:
    """One sync, as every rank is told.

    Attributes:
        key: of the sync; names what is kept in each context.
        version: number of the weights.
        is_full: all tensors; else those that training changes.
        is_double: receive beside the weights that are served.
        checks: `false`: digests of the blocks whose turn it is; `digest`: of all blocks; `full`:
            those and a second pass that compares every element.
        is_check: this is that second pass.
    """

    key: str
    version: int
    is_full: bool = True
    is_double: bool = False
    checks: str = "false"
    is_check: bool = False


@dataclass(frozen=True)
class Offer:
    """What one rank has to give in this sync.

    Attributes:
        index: its endpoint.
        label: how messages name it.
        version: of the weights.
        handles: tensors that other processes may open.
        lent: tensors for models of the same process.
        digests: by number of the block.
    """

    index: int
    label: str
    version: int
    handles: Mapping[str, TensorHandle]
    lent: Mapping[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])
    digests: Mapping[int, int] = field(default_factory=dict[int, int])


class _Programs:
    """This rank's programs; a resource of its context."""

    def __init__(self, full: RankProgram, trained: RankProgram | None, reserved_bytes: int) -> None:
        self.full = full
        self.trained = trained
        self.reserved_bytes = reserved_bytes

    def of(self, call: SyncCall) -> RankProgram:
        """What this rank does in a sync."""
        return self.full if call.is_full or self.trained is None else self.trained

    def close(self) -> None:
        """Nothing is held."""


class _Early:
    """What `pull_early` copied, and by which handles; a resource of the context."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.handles: dict[int, Mapping[str, TensorHandle]] = {}

    def has(self, call: SyncCall, offer: Offer) -> bool:
        """Whether the tensors of an offer were copied in this sync already."""
        return self.version == call.version and self.handles.get(offer.index) == offer.handles

    def close(self) -> None:
        """Forget it."""
        self.version = None
        self.handles = {}


class _Shadow:
    """A second copy of the weights, in the mode `double`; a resource of the context."""

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        import torch

        self.tensors = {name: torch.empty_like(tensor) for name, tensor in live.items()}

    def close(self) -> None:
        """Forget it."""
        self.tensors.clear()


def describe_endpoint(context: WorkerContext, naming: str | None = None) -> Endpoint:
    """This rank and its shards, for the planner, in the given naming (None: its own)."""
    module = context.module
    shards = module.weight_shards() if naming is None else module.weight_shards_in(naming)
    device = context.device
    return Endpoint(
        context.model_name,
        context.replica,
        context.rank,
        context.node_id,
        context.process_id,
        tuple(shards),
        "" if device.type == "cpu" else _device_id(device),
        frozenset(module.frozen_weights()),
    )


def install_programs(
    context: WorkerContext, key: str, full: RankProgram, trained: RankProgram | None
) -> None:
    """Keep what this rank does in each sync of this key."""
    for kind in ("programs", "opened", "shared", "shadow", "early"):
        context.drop((f"sync {kind}", key))
    reserved = context.reserved_shm_bytes
    context.keep(("sync programs", key), lambda: _Programs(full, trained, reserved))


def is_shareable(context: WorkerContext, key: str, names: Sequence[str], is_double: bool) -> bool:
    """Share the named tensors; False where shared memory is too small, or cannot be used.

    A module whose `weight_tensors` gives new tensors each time (merged, say) cannot share: what a
    reader would open is gone when it reads.
    """
    live = _live_tensors(context)
    again = context.module.weight_tensors()
    if any(live[name].data_ptr() != again[name].data_ptr() for name in names):
        return False
    tensors = _targets(context, key, live) if is_double else live
    return _share(context, key, {name: tensors[name] for name in names}) is not None


def pull_early(context: WorkerContext, call: SyncCall) -> None:
    """Copy by the handles of the sync before, for `pull_weights` to confirm.

    The caller knows that the sources stand still. Nothing is copied where a source is new.
    """
    early = context.keep(("sync early", call.key), _Early)
    early.close()
    program = _programs(context, call.key).of(call)
    opened = context.keep(("sync opened", call.key), OpenedTensors)
    if any(not opened.knows(pull.source) for pull in program.pulls):
        return
    live = _live_tensors(context)
    _check_described(program, live, _label(context))
    targets = _begin(context, call, live)
    with _all_cores(program):
        for pull in program.pulls:
            _copy(pull, opened.tensors(pull.source), targets)
    early.version = call.version
    early.handles = {pull.source: opened.handles(pull.source) for pull in program.pulls}


def offer_weights(context: WorkerContext, call: SyncCall) -> Offer:
    """Check this rank's tensors, and say how others get at them.

    Raises:
        SyncError: a tensor is no longer as it was described.
    """
    program = _programs(context, call.key).of(call)
    live = _live_tensors(context)
    _check_described(program, live, _label(context))
    is_served = program.is_destination and call.is_double
    tensors = _targets(context, call.key, live) if is_served else live
    handles = _share(context, call.key, {name: tensors[name] for name in program.exported})
    if handles is None:
        raise SyncError(
            f"{_label(context)} has new tensors, and shared memory has no room for them: give "
            "/dev/shm more, or set runtime.weight_sync_transport: collective"
        )
    lent = {name: tensors[name] for name in program.lent}
    digests: dict[int, int] = {}
    if not program.is_destination and not call.is_check:
        blocks = _chosen(_programs(context, call.key).full, call)
        digests = {block.number: _digest(block, tensors) for block in blocks}
    return Offer(program.index, _label(context), call.version, handles, lent, digests)


def exchange_weights(context: WorkerContext, call: SyncCall) -> None:
    """Send and receive what goes over the channel.

    Raises:
        SyncError: a message failed, or (in a check) something differs.
    """
    program = _programs(context, call.key).of(call)
    if not program.steps:
        return
    channel: Channel = context.keep(("sync channel", call.key), _missing_channel)
    live = _live_tensors(context)
    _check_described(program, live, _label(context))
    taken: Mapping[str, Any] = live
    if program.is_destination and not call.is_check:
        taken = _begin(context, call, live)
    differing: list[str] | None = [] if call.is_check else None
    channel.run(program.steps, live, taken, differing)
    _raise_differing(context, differing or ())


def pull_weights(context: WorkerContext, call: SyncCall, offers: Sequence[Offer]) -> None:
    """Copy what this rank takes from others' tensors, and compare digests with theirs.

    In the mode `in_place` the new weights are in force when this returns.

    Raises:
        SyncError: an offer is of another version, or what is here differs from the source's.
    """
    programs = _programs(context, call.key)
    program = programs.of(call)
    live = _live_tensors(context)
    _check_described(program, live, _label(context))
    by_index = {offer.index: offer for offer in offers}
    for offer in offers:
        if offer.version != call.version:
            raise SyncError(
                f"{_label(context)} awaits version {call.version} of the weights, but "
                f"{offer.label} offers version {offer.version}"
            )
    if call.is_check:
        _compare(context, call.key, program, live, by_index)
        return
    targets = _begin(context, call, live)
    early = context.keep(("sync early", call.key), _Early)
    with _all_cores(program):
        for pull in program.pulls:
            offer = by_index[pull.source]
            if not early.has(call, offer):
                _copy(pull, _open(context, call.key, offer), targets)
    early.close()
    if context.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    # In a sync of the changed tensors only, the others are here since the last full one.
    _check_digests(context, programs.full, call, targets, by_index)
    if not call.is_double:
        _finish(context, call.version)


def commit_weights(context: WorkerContext, call: SyncCall) -> None:
    """Put the second copy into force; a local copy that needs nobody else."""
    program = _programs(context, call.key).of(call)
    live = _live_tensors(context)
    shadow = _targets(context, call.key, live)
    for name in program.described:
        live[name].copy_(shadow[name])
    _finish(context, call.version)


def spoil_weights(context: WorkerContext, reason: str) -> None:
    """Refuse to serve until the next full sync: other ranks do not have these weights."""
    context.unusable_reason = reason


def _begin(
    context: WorkerContext, call: SyncCall, live: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """Where new weights go; in place, nothing may be served from now on."""
    if call.is_double:
        return _targets(context, call.key, live)
    context.unusable_reason = (
        f"the weights of {_label(context)} are half new: sync {call.key} to version "
        f"{call.version} did not finish"
    )
    return live


def _finish(context: WorkerContext, version: int) -> None:
    context.module.after_weight_sync(version)
    context.unusable_reason = ""


def _compare(
    context: WorkerContext,
    key: str,
    program: RankProgram,
    live: Mapping[str, torch.Tensor],
    offers: Mapping[int, Offer],
) -> None:
    differing: list[str] = []
    for pull in program.pulls:
        tensors = _open(context, key, offers[pull.source])
        for given, taken in zip(pull.source_parts, pull.parts, strict=True):
            region = live[taken.local_name][taken.slices]
            source = tensors[given.local_name][given.slices].view(region.shape)
            if not has_equal_bits(region, source.to(region.dtype)):
                differing.append(_describe(taken))
    _raise_differing(context, differing)


def _raise_differing(context: WorkerContext, differing: Sequence[str]) -> None:
    if differing:
        raise SyncError(
            f"after the sync {len(differing)} parts differ on {_label(context)}: "
            f"{'; '.join(differing[:4])}"
        )


def _copy(
    pull: Pull, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
) -> None:
    for given, taken in zip(pull.source_parts, pull.parts, strict=True):
        region = targets[taken.local_name][taken.slices]
        region.copy_(tensors[given.local_name][given.slices].view(region.shape))


@contextmanager
def _all_cores(program: RankProgram) -> Generator[None]:
    """Copy with the cores of all ranks of this node: the others stand still."""
    import torch

    before = torch.get_num_threads()
    cores = len(os.sched_getaffinity(0)) // max(1, program.num_neighbours)
    torch.set_num_threads(max(before, min(cores, _MOST_THREADS)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_digests(
    context: WorkerContext,
    program: RankProgram,
    call: SyncCall,
    tensors: Mapping[str, torch.Tensor],
    offers: Mapping[int, Offer],
) -> None:
    for block in _chosen(program, call):
        offer = offers[block.origin]
        if offer.digests.get(block.number) != _digest(block, tensors):
            raise SyncError(
                f"{_describe(block.part)} differs on {_label(context)} from that of {offer.label} "
                f"after the sync to version {call.version}"
            )


def _chosen(program: RankProgram, call: SyncCall) -> Iterable[Block]:
    if call.checks != "false":
        return program.blocks
    return program.blocks_of_turn(call.version % NUM_TURNS)


def _digest(block: Block, tensors: Mapping[str, torch.Tensor]) -> int:
    import torch

    region = tensors[block.part.local_name][block.part.slices]
    return compute_digest(region.to(getattr(torch, block.dtype)))


def _check_described(program: RankProgram, tensors: Mapping[str, torch.Tensor], label: str) -> None:
    for name, described in program.described.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise SyncError(f"{label} no longer has {name} ({described.key})")
        is_large = tensor.dim() == len(described.least_shape) and all(
            have >= need for have, need in zip(tensor.shape, described.least_shape, strict=True)
        )
        if not is_large or str(tensor.dtype) != f"torch.{described.dtype}":
            raise SyncError(
                f"{label} described {name} ({described.key}) as {described.dtype} of at least "
                f"{described.least_shape}, but has {tensor.dtype} of {tuple(tensor.shape)}"
            )


def _live_tensors(context: WorkerContext) -> Mapping[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in context.module.weight_tensors().items()}


def _targets(
    context: WorkerContext, key: str, live: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    return context.keep(("sync shadow", key), lambda: _Shadow(live)).tensors


def _programs(context: WorkerContext, key: str) -> _Programs:
    return context.keep(("sync programs", key), _missing_programs)


def _share(
    context: WorkerContext, key: str, tensors: Mapping[str, torch.Tensor]
) -> dict[str, TensorHandle] | None:
    shared = context.keep(("sync shared", key), SharedTensors)
    programs = _programs(context, key)
    return shared.share(
        tensors, reserved_bytes=programs.reserved_bytes, timeout_s=context.timeout_s
    )


def _open(context: WorkerContext, key: str, offer: Offer) -> Mapping[str, torch.Tensor]:
    if offer.lent:
        return offer.lent
    opened = context.keep(("sync opened", key), OpenedTensors)
    return opened.open(offer.index, offer.handles, context.device)


def _missing_channel() -> Channel:
    raise SyncError("the sync channel is not open: prepare the synchronizer first")


def _missing_programs() -> _Programs:
    raise SyncError("this rank has no part in the sync: prepare the synchronizer first")


def _device_id(device: torch.device) -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _describe(part: Part) -> str:
    return f"{part.key} (local {part.local_name}, slice {_show(part.slices)})"


def _show(slices: Sequence[slice]) -> str:
    return "[" + ", ".join(f"{each.start}:{each.stop}" for each in slices) + "]"


def _label(context: WorkerContext) -> str:
    return f"{context.model_name}.r{context.replica}.{context.rank}"
