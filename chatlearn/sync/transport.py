"""Executes a sync plan inside the workers: rank to rank, never through the driver.

A channel is a gloo process group over all ranks of both models, made once and kept in the
worker's context. Every rank handles its messages in the plan's order, which is the same
everywhere, so no two ranks wait for each other in turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from chatlearn.errors import SyncError
from chatlearn.sync.plan import Endpoint, Message

if TYPE_CHECKING:
    import torch

    from chatlearn.parallel.context import WorkerContext

__all__ = [
    "ChannelAddress",
    "describe_endpoint",
    "export_weights",
    "host_channel",
    "move_weights",
    "open_channel",
    "take_weights",
]


# Messages of one pair of ranks arrive in the order they are sent, so one tag serves.
_TAG = 1


@dataclass(frozen=True)
class ChannelAddress:
    """Where the ranks of a channel meet: a key of the context's resources and a store."""

    key: str
    host: str
    port: int
    size: int
    labels: tuple[str, ...]


class _Store:
    """The store that rank 0 of a channel hosts."""

    def __init__(self, host: str, timeout_s: float) -> None:
        import torch.distributed as dist

        timeout = timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(host, 0, None, True, timeout, wait_for_workers=False)

    def close(self) -> None:
        """Let go of the store."""
        del self.store


class _Channel:
    """One rank's end of a channel."""

    def __init__(self, address: ChannelAddress, rank: int, store: Any, timeout_s: float) -> None:
        import torch.distributed as dist

        self.rank = rank
        self.labels = address.labels
        prefixed = dist.PrefixStore(address.key, store)
        timeout = timedelta(seconds=timeout_s)
        self.group = dist.ProcessGroupGloo(prefixed, rank, address.size, timeout)

    def close(self) -> None:
        """Leave the group."""
        del self.group


def describe_endpoint(context: WorkerContext) -> Endpoint:
    """This rank and its shards, for the planner."""
    return Endpoint(
        context.model_name,
        context.replica,
        context.rank,
        context.node_id,
        context.process_id,
        tuple(context.module.weight_shards()),
    )


def host_channel(context: WorkerContext, key: str) -> tuple[str, int]:
    """Open the store of a channel in this worker; gives host and port."""
    kept = context.keep(("sync store", key), lambda: _Store(context.host, context.timeout_s))
    return context.host, kept.store.port


def open_channel(context: WorkerContext, address: ChannelAddress, rank: int) -> None:
    """Join a channel as `rank`; returns when every rank has come.

    Raises:
        SyncError: a rank did not come within the timeout.
    """
    import torch.distributed as dist

    timeout = timedelta(seconds=context.timeout_s)
    try:
        if rank == 0:
            hosted = context.keep(
                ("sync store", address.key), lambda: _Store(context.host, context.timeout_s)
            )
            store = hosted.store
        else:
            store = dist.TCPStore(address.host, address.port, None, False, timeout)
        context.drop(("sync channel", address.key))
        context.keep(
            ("sync channel", address.key),
            lambda: _Channel(address, rank, store, context.timeout_s),
        )
    except RuntimeError as error:
        raise SyncError(
            f"{address.labels[rank]} could not open its sync channel within "
            f"{context.timeout_s:g} s: {error}"
        ) from error


def move_weights(
    context: WorkerContext,
    key: str,
    messages: Sequence[Message],
    version: int,
    is_check: bool,
) -> None:
    """Send and receive this rank's messages of a plan.

    Args:
        context: the worker.
        key: of the channel.
        messages: those of the plan in which this rank takes part, in the plan's order.
        version: of the weights; given to the module once all are written.
        is_check: compare what comes with what is there, instead of writing it.

    Raises:
        SyncError: a peer did not come in time (names it and the tensor awaited), or, with
            `is_check`, an element differs (names tensor, rank and slice).
    """
    channel = context.keep(("sync channel", key), _missing_channel)
    tensors = context.module.weight_tensors()
    is_destination = False
    for number, message in enumerate(messages):
        is_source = message.source == channel.rank
        peer = message.destination if is_source else message.source
        try:
            if is_source:
                _point_to_point(channel).send([_pack(message, tensors)], peer, _TAG).wait()
            else:
                is_destination = True
                buffer = _empty_buffer(message)
                _point_to_point(channel).recv([buffer], peer, _TAG).wait()
                _unpack(message, tensors, buffer, channel.labels[channel.rank], is_check)
        except RuntimeError as error:
            verb = "to send" if is_source else "to receive"
            raise SyncError(
                f"{channel.labels[channel.rank]} failed {verb} {message.transfers[0].source.key} "
                f"(message {number + 1} of {len(messages)}) with {channel.labels[peer]}: {error}"
            ) from error
    if is_destination and not is_check:
        context.module.after_weight_sync(version)


def export_weights(context: WorkerContext) -> Mapping[str, torch.Tensor]:
    """The live tensors of this rank, for a destination in the same process."""
    return context.module.weight_tensors()


def take_weights(
    context: WorkerContext,
    messages: Sequence[Message],
    exported: Mapping[str, torch.Tensor],
    version: int,
    is_check: bool,
) -> None:
    """Copy from tensors of the same process; arguments as in `move_weights`."""
    import torch

    tensors = context.module.weight_tensors()
    label = f"{context.model_name}.r{context.replica}.{context.rank}"
    with torch.no_grad():
        for message in messages:
            _unpack(message, tensors, _pack(message, exported), label, is_check)
    if not is_check:
        context.module.after_weight_sync(version)


def _missing_channel() -> _Channel:
    raise SyncError("the sync channel is not open: prepare the synchronizer first")


def _point_to_point(channel: Any) -> Any:
    """The channel's group, whose raw send and recv torch leaves out of its type stubs."""
    return channel.group


def _pack(message: Message, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    import torch

    parts = [
        tensors[t.source.local_name][t.source.local_slices(t.box)].reshape(-1)
        for t in message.transfers
    ]
    return (torch.cat(parts) if len(parts) > 1 else parts[0].clone()).cpu().contiguous()


def _empty_buffer(message: Message) -> torch.Tensor:
    import torch

    size = sum(transfer.box.num_elements for transfer in message.transfers)
    return torch.empty(size, dtype=getattr(torch, message.transfers[0].source.dtype))


def _unpack(
    message: Message,
    tensors: Mapping[str, torch.Tensor],
    buffer: torch.Tensor,
    label: str,
    is_check: bool,
) -> None:
    import torch

    start = 0
    for transfer in message.transfers:
        size = transfer.box.num_elements
        part = buffer[start : start + size]
        start += size
        target = tensors[transfer.destination.local_name]
        slices = transfer.destination.local_slices(transfer.box)
        region = target[slices]
        part = part.view(region.shape).to(target.dtype).to(target.device)
        if not is_check:
            with torch.no_grad():
                region.copy_(part)
        elif not torch.equal(region, part):
            raise SyncError(
                f"{transfer.destination.key} differs after the sync on {label}, parameter "
                f"{transfer.destination.local_name}, slice {slices}"
            )
