# pyright: standard, reportPrivateImportUsage=false
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
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from chatlearn.errors import SyncError
from chatlearn.models.base import BaseModule
from chatlearn.sync.channel import Channel, MessageError
from chatlearn.sync.copies import run_copies
from chatlearn.sync.digest import compute_digests, has_equal_bits, hash_tensors
from chatlearn.sync.programs import NUM_TURNS, Block, RankProgram
from chatlearn.sync.rank_calls import Failure
from chatlearn.sync.records import Endpoint
from chatlearn.sync.shared_memory import (
    CounterFiles,
    OpenedTensors,
    SharedTensors,
    TensorHandle,
)
from chatlearn.sync.state import Early, Offer, Programs, Shadow, SyncCall

if TYPE_CHECKING:
    import torch

    from chatlearn.parallel.context import WorkerContext

__all__ = [
    "commit_weights",
    "describe_endpoint",
    "exchange_weights",
    "forget_sync",
    "install_programs",
    "is_shareable",
    "offer_weights",
    "pull_early",
    "pull_weights",
    "spoil_weights",
]

# More threads than this no longer copy faster.
_MOST_THREADS = 8


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
        type(module).before_weight_sync is not BaseModule.before_weight_sync,
    )


def install_programs(
    context: WorkerContext, key: str, full: RankProgram, trained: RankProgram | None
) -> None:
    """Keep what this rank does in each sync of this key."""
    forget_sync(context, key)
    live = _live_tensors(context) if full.described else {}
    shapes = {name: tuple(tensor.shape) for name, tensor in live.items()}
    reserved = context.reserved_shm_bytes
    context.keep(("sync programs", key), lambda: Programs(full, trained, reserved, shapes))


def forget_sync(context: WorkerContext, key: str) -> None:
    """Let go of everything that syncs of this key keep here."""
    for kind in ("programs", "opened", "shared", "shadow", "early", "channel", "store"):
        context.drop((f"sync {kind}", key))


def is_shareable(context: WorkerContext, key: str, names: Sequence[str], is_double: bool) -> bool:
    """Share the named tensors; False where shared memory is too small, or cannot be used.

    A module whose `weight_tensors` gives new tensors each time (merged, say) cannot share: what a
    reader would open is gone when it reads.
    """
    live = _live_tensors(context)
    again = context.module.weight_tensors()
    if any(live[name].data_ptr() != again[name].data_ptr() for name in names):
        return False
    named = {name: live[name] for name in names}
    return _share(context, key, Shadow(named).tensors if is_double else named) is not None


def pull_early(context: WorkerContext, call: SyncCall) -> None:
    """Copy by the handles of the sync before, for `pull_weights` to confirm.

    The caller knows that the sources stand still. Nothing is copied where a source is new.
    """
    early = context.keep(("sync early", call.key), Early)
    early.close()
    programs = _programs(context, call.key)
    copies = programs.copies_of(call)
    opened = context.keep(("sync opened", call.key), OpenedTensors)
    # After a sync of the changed tensors alone, the others of a full one are not open.
    if any(
        copy.given.local_name not in opened.tensors(source)
        for source, found in copies.items()
        for copy in found
    ):
        return
    live = _checked_tensors(context, call)
    targets = _begin(context, call, live)
    with _all_cores(programs.of(call)):
        for source, found in copies.items():
            run_copies(found, opened.tensors(source), targets)
    early.call = call
    early.handles = {source: opened.handles(source) for source in copies}


def offer_weights(context: WorkerContext, call: SyncCall) -> Offer:
    """Check this rank's tensors, and say how others get at them.

    Raises:
        SyncError: a tensor is no longer as it was described, or the weights are half new.
    """
    program = _programs(context, call.key).of(call)
    # In place, one that only passes weights on is marked until it has all of them.
    if context.unusable_reason and not program.is_destination:
        raise SyncError(
            f"{_label(context)} was asked for its weights, which nobody may take: "
            f"{context.unusable_reason}; take them from another replica, or sync this one in full "
            "first"
        )
    if not program.is_destination and not call.is_check:
        context.module.before_weight_sync()
    live = _checked_tensors(context, call)
    is_served = program.is_destination and call.is_double
    tensors = _targets(context, call.key, live) if is_served else live
    handles = _share(context, call.key, {name: tensors[name] for name in program.exported})
    if handles is None:
        raise SyncError(
            f"{_label(context)} has new tensors, and shared memory has no room for them: give "
            "/dev/shm more, or set runtime.weight_sync_transport: collective"
        )
    lent = {name: tensors[name] for name in program.lent}
    # Who takes them looks at memory, whatever kernels, or messages that came, still write to it.
    _await_device(context)
    digests: dict[int, int] = {}
    frozen = frozenset[str]()
    if not program.is_destination and not call.is_check:
        frozen = frozenset(context.module.frozen_weights())
        blocks = _chosen(_programs(context, call.key).full, call)
        digests = _digest(blocks, tensors, call)
    version = context.weights_version
    return Offer(program.index, _label(context), version, handles, lent, digests, frozen)


def exchange_weights(context: WorkerContext, call: SyncCall, limit_s: float) -> Failure | None:
    """Send and receive what goes over the channel; a message that failed is given back.

    Args:
        context: of this rank.
        call: the sync.
        limit_s: by when all messages must be through, in seconds from now.

    Raises:
        SyncError: in a check, something differs.
    """
    program = _programs(context, call.key).of(call)
    channel: Channel = context.keep(("sync channel", call.key), _missing_channel)
    differing: list[str] | None = [] if call.is_check else None
    try:
        live = _checked_tensors(context, call)
        taken: Mapping[str, Any] = live
        if program.is_destination:
            taken = _begin(context, call, live)
        channel.run(program.steps, live, taken, limit_s, differing)
    except BaseException as error:
        # Without this end the others notice at once, and need not wait for their timeouts.
        context.drop(("sync channel", call.key))
        if isinstance(error, MessageError):
            return Failure(str(error), error.is_lost, error.peer)
        raise
    _raise_differing(context, differing or ())
    return None


def pull_weights(context: WorkerContext, call: SyncCall, offers: Sequence[Offer]) -> None:
    """Copy what this rank takes from others' tensors, and compare digests with theirs.

    In the mode `in_place` the new weights are in force when this returns.

    Raises:
        SyncError: what is here differs from the source's.
    """
    programs = _programs(context, call.key)
    program = programs.of(call)
    live = _checked_tensors(context, call)
    by_index = {offer.index: offer for offer in offers}
    targets = _begin(context, call, live)
    if call.is_check:
        _compare(context, call.key, program, targets, by_index)
        return
    early = context.keep(("sync early", call.key), Early)
    with _all_cores(program):
        for source, copies in programs.copies_of(call).items():
            offer = by_index[source]
            if not early.has(call, offer):
                run_copies(copies, _open(context, call.key, offer), targets)
    early.close()
    _await_device(context)
    # In a sync of the changed tensors only, the others are here since the last full one.
    with _all_cores(program):
        _check_digests(context, programs.full, call, targets, by_index)
    if not call.is_double:
        _finish(context, call.version)


def commit_weights(context: WorkerContext, call: SyncCall) -> None:
    """Put the second copy into force; a local copy that needs nobody else.

    Only what the sync has written is copied: the rest of a tensor, such as rows that pad a
    vocabulary, is this rank's own.

    Raises:
        SyncError: what is in force differs from the second copy.
    """
    programs = _programs(context, call.key)
    live = _checked_tensors(context, call)
    shadow = _targets(context, call.key, live)
    _begin_serving(context, call)
    for block in programs.of(call).blocks:
        name, slices = block.part.local_name, block.part.slices
        live[name][slices].copy_(shadow[name][slices])
    for block in _chosen(programs.full, call):
        name, slices = block.part.local_name, block.part.slices
        if not has_equal_bits(live[name][slices], shadow[name][slices]):
            raise SyncError(
                f"{block.part.label} differs on {_label(context)} from its second copy after the "
                f"sync to version {call.version}"
            )
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
    if not call.is_check:
        _begin_serving(context, call)
    return live


def _begin_serving(context: WorkerContext, call: SyncCall) -> None:
    """From now on what is served is half new, until `_finish`."""
    context.unusable_reason = (
        f"the weights of {_label(context)} are half new: sync {call.key} to version "
        f"{call.version} did not finish"
    )


def _finish(context: WorkerContext, version: int) -> None:
    context.module.after_weight_sync(version)
    context.weights_version = version
    context.unusable_reason = ""


def _compare(
    context: WorkerContext,
    key: str,
    program: RankProgram,
    targets: Mapping[str, torch.Tensor],
    offers: Mapping[int, Offer],
) -> None:
    differing: list[str] = []
    # Once for each source: what it offers may be what is open, which takes a comparison to see.
    sources = {pull.source for pull in program.pulls}
    opened = {source: _open(context, key, offers[source]) for source in sources}
    for pull in program.pulls:
        tensors = opened[pull.source]
        for given, taken in zip(pull.source_parts, pull.parts, strict=True):
            region = targets[taken.local_name][taken.slices]
            source = tensors[given.local_name][given.slices].view(region.shape)
            if not has_equal_bits(region, source.to(region.dtype)):
                differing.append(taken.label)
    _raise_differing(context, differing)


def _raise_differing(context: WorkerContext, differing: Sequence[str]) -> None:
    if differing:
        raise SyncError(
            f"after the sync {len(differing)} parts differ on {_label(context)}: "
            f"{'; '.join(differing[:4])}"
        )


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
    blocks = _chosen(program, call)
    own = _digest(blocks, tensors, call)
    for block in blocks:
        offer = offers[block.origin]
        if offer.digests.get(block.number) != own[block.number]:
            raise SyncError(
                f"{block.part.label} differs on {_label(context)} from that of {offer.label} "
                f"after the sync to version {call.version}"
            )


def _chosen(program: RankProgram, call: SyncCall) -> Sequence[Block]:
    if call.checks != "false":
        return program.blocks
    return program.blocks_of_turn(call.turn % NUM_TURNS)


def _digest(
    blocks: Sequence[Block], tensors: Mapping[str, torch.Tensor], call: SyncCall
) -> dict[int, int]:
    """Digests by number of the block, in the dtype that both sides compute in."""
    import torch

    regions = (
        tensors[block.part.local_name][block.part.slices].to(getattr(torch, block.dtype))
        for block in blocks
    )
    numbers = (block.number for block in blocks)
    compute = hash_tensors if call.is_on_cpu else compute_digests
    return dict(zip(numbers, compute(regions), strict=True))


def _checked_tensors(context: WorkerContext, call: SyncCall) -> Mapping[str, torch.Tensor]:
    """The live tensors; an error where one is not as described, or as when that was."""
    programs, tensors, label = _programs(context, call.key), _live_tensors(context), _label(context)
    for name, described in programs.of(call).described.items():
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
        if tuple(tensor.shape) != programs.shapes.get(name):
            raise SyncError(
                f"{label} had {name} ({described.key}) with the shape {programs.shapes.get(name)} "
                f"when the sync was prepared, but has {tuple(tensor.shape)} now"
            )
    return tensors


def _await_device(context: WorkerContext) -> None:
    """On a GPU, wait for all work that was given to it, on every stream."""
    if context.device.type == "cuda":
        import torch

        torch.cuda.synchronize(context.device)


def _live_tensors(context: WorkerContext) -> Mapping[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in context.module.weight_tensors().items()}


def _targets(
    context: WorkerContext, key: str, live: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    def build() -> Shadow:
        return Shadow({name: live[name] for name in _programs(context, key).full.described})

    return context.keep(("sync shadow", key), build).tensors


def _programs(context: WorkerContext, key: str) -> Programs:
    return context.keep(("sync programs", key), _missing_programs)


def _share(
    context: WorkerContext, key: str, tensors: Mapping[str, torch.Tensor]
) -> dict[str, TensorHandle] | None:
    shared = context.keep(("sync shared", key), SharedTensors)
    programs = _programs(context, key)
    handles = shared.share(
        tensors, reserved_bytes=programs.reserved_bytes, timeout_s=context.timeout_s
    )
    if handles and context.device.type == "cuda":
        context.keep("counter files", CounterFiles).add(handles)
    return handles


def _open(context: WorkerContext, key: str, offer: Offer) -> Mapping[str, torch.Tensor]:
    if offer.lent:
        return offer.lent
    opened = context.keep(("sync opened", key), OpenedTensors)
    return opened.open(offer.index, offer.handles, context.device)


def _missing_channel() -> Channel:
    raise SyncError("the sync channel is not open: prepare the synchronizer first")


def _missing_programs() -> Programs:
    raise SyncError("this rank has no part in the sync: prepare the synchronizer first")


def _device_id(device: torch.device) -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _label(context: WorkerContext) -> str:
    return f"{context.model_name}.r{context.replica}.{context.rank}"
