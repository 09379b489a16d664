"""Point-to-point messages between ranks of different models: a process group of their own.

Each rank keeps its end in its context. Steps run in the plan's order, some at a time: while
messages are on the wire the next is packed, or the last one unpacked, in buffers of two buckets in
all that are used again and again. The earliest step that is not finished anywhere has both its ends
waiting for it, so no order of arrival can deadlock.
"""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from chatlearn.errors import SyncError
from chatlearn.parallel.sockets import open_store
from chatlearn.sync.digest import has_equal_bits
from chatlearn.sync.programs import Part, Step
from chatlearn.sync.rank_calls import Failure

if TYPE_CHECKING:
    import torch

    from chatlearn.parallel.context import WorkerContext

__all__ = [
    "Channel",
    "ChannelAddress",
    "MessageError",
    "choose_backend",
    "host_channel",
    "open_channel",
]

# Messages of one pair of ranks arrive in the order they are sent, so one tag serves.
_TAG = 1
_MOST_IN_FLIGHT = 8
# What gloo is given at least: it takes 0 for its own default.
_LEAST_WAIT_S = 0.001
# What gloo and NCCL say where the other end is gone, not late.
_LOST = ("connection", "broken pipe", "remote process", "socket")


class MessageError(SyncError):
    """A message that did not come through.

    Attributes:
        is_lost: the other end is gone, which often only follows another rank's failure.
        peer: endpoint at the other end.
    """

    def __init__(self, text: str, *, is_lost: bool, peer: int) -> None:
        super().__init__(text)
        self.is_lost = is_lost
        self.peer = peer


@dataclass(frozen=True)
class ChannelAddress:
    """Where the ranks of a channel meet.

    Attributes:
        key: of the sync; names the channel in each context.
        host: of the store.
        port: of the store.
        members: indices of the endpoints that take part.
        labels: what messages call them, in the same order.
        backend: `gloo` or `nccl`.
        timeout_s: of the ranks' meeting; with NCCL of every message, too.
        staging_bytes: most bytes of buffers that one rank uses.
    """

    key: str
    host: str
    port: int
    members: tuple[int, ...]
    labels: tuple[str, ...]
    backend: str
    timeout_s: float
    staging_bytes: int


class _Staging:
    """Buffers of a bounded size in all; those given back are used again."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._free: list[torch.Tensor] = []
        self._held_bytes = 0
        self._used_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether `take` stays within the bound; one buffer alone always does."""
        return not self._used_bytes or self._used_bytes + num_bytes <= self._most_bytes

    def take(self, num_bytes: int, device: torch.device) -> torch.Tensor:
        """A buffer of bytes, perhaps a larger one."""
        import torch

        fitting = [buffer for buffer in self._free if buffer.numel() >= num_bytes]
        if fitting:
            buffer = min(fitting, key=len)
            self._free = [free for free in self._free if free is not buffer]
        else:
            if self._held_bytes + num_bytes > self._most_bytes:
                self._held_bytes -= sum(free.numel() for free in self._free)
                self._free = []
            buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
            self._held_bytes += num_bytes
        self._used_bytes += buffer.numel()
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """End the use of a buffer."""
        self._used_bytes -= buffer.numel()
        self._free.append(buffer)


class _Store:
    """The store that one rank of a channel hosts."""

    def __init__(self, host: str, timeout_s: float) -> None:
        self.store = open_store(host, timeout_s)

    def close(self) -> None:
        """Let go of the store."""
        del self.store


@dataclass
class _Flight:
    """A step on its way: the work to wait for, and what is left to do then."""

    step: Step
    work: Any
    buffer: torch.Tensor
    staging: torch.Tensor | None

    @property
    def is_awaited(self) -> bool:
        """Whether it brings something."""
        return not self.step.is_send


class Channel:
    """One rank's end of a channel; a resource of its context."""

    def __init__(self, address: ChannelAddress, index: int, store: Any) -> None:
        import torch.distributed as dist

        self._label = address.labels[address.members.index(index)]
        self._labels = dict(zip(address.members, address.labels, strict=True))
        self._ranks = {member: rank for rank, member in enumerate(address.members)}
        self._limit_s = address.timeout_s
        self._deadline = 0.0
        prefixed = dist.PrefixStore(address.key, store)
        rank, size = self._ranks[index], len(address.members)
        self._is_staged = address.backend == "gloo"
        self._staging = _Staging(address.staging_bytes)
        self._group: Any
        if self._is_staged:
            timeout = timedelta(seconds=address.timeout_s)
            self._group = dist.ProcessGroupGloo(prefixed, rank, size, timeout)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timedelta(seconds=address.timeout_s)
            self._group = dist.ProcessGroupNCCL(prefixed, rank, size, options)

    def close(self) -> None:
        """Leave the group."""
        del self._group

    def run(
        self,
        steps: Sequence[Step],
        given: Mapping[str, torch.Tensor],
        taken: Mapping[str, torch.Tensor],
        limit_s: float,
        differing: list[str] | None = None,
    ) -> None:
        """Work through the steps of this rank.

        Args:
            steps: in the plan's order.
            given: tensors to send from, by local name.
            taken: tensors to receive into, by local name; also what is passed on from.
            limit_s: when all of them must be over, in seconds from now. It is the same on all
                ranks, so that who waits in vain says so before the driver asks who is late.
            differing: where given, nothing is written: what differs from what came is listed.

        Raises:
            MessageError: a message failed; names both ranks and the tensor.
        """
        self._limit_s, self._deadline = limit_s, time.monotonic() + limit_s
        flights: deque[_Flight] = deque()
        own = {step.message for step in steps if not step.is_send}
        for number, step in enumerate(steps):
            if step.is_send and any(
                f.step.message == step.message for f in flights if f.is_awaited
            ):
                # What is passed on must have come.
                self._finish_all(flights, taken, differing)
            tensors = taken if not step.is_send or step.message in own else given
            staged_bytes = self._staged_bytes(step, tensors, is_check=differing is not None)
            while flights and (
                len(flights) >= _MOST_IN_FLIGHT or not self._staging.has_room(staged_bytes)
            ):
                self._finish(flights.popleft(), taken, differing)
            try:
                flights.append(self._start(step, tensors, staged_bytes))
            except RuntimeError as error:
                raise self._failure(step, error, f"step {number + 1} of {len(steps)}") from error
        self._finish_all(flights, taken, differing)

    def _staged_bytes(
        self, step: Step, tensors: Mapping[str, torch.Tensor], *, is_check: bool
    ) -> int:
        """Bytes of the buffer that a step needs; 0 where its region itself goes on the wire."""
        import torch

        region = _dense_region(step, tensors)
        is_checked = is_check and not step.is_send
        is_far = region is not None and self._is_staged and region.device.type != "cpu"
        if region is not None and not is_checked and not is_far:
            return 0
        count = sum(_region(part, tensors).numel() for part in step.parts)
        return count * getattr(torch, step.dtype).itemsize

    def _start(self, step: Step, tensors: Mapping[str, torch.Tensor], staged_bytes: int) -> _Flight:
        import torch

        staging: torch.Tensor | None = None
        if not staged_bytes:
            buffer = _region(step.parts[0], tensors)
        else:
            live = tensors[step.parts[0].local_name].device
            device = torch.device("cpu") if self._is_staged else live
            staging = self._staging.take(staged_bytes, device)
            buffer = staging[:staged_bytes].view(getattr(torch, step.dtype))
            if step.is_send:
                _pack(step, tensors, buffer)
        action = self._group.send if step.is_send else self._group.recv
        return _Flight(step, action([buffer], self._ranks[step.peer], _TAG), buffer, staging)

    def _finish_all(
        self,
        flights: deque[_Flight],
        tensors: Mapping[str, torch.Tensor],
        differing: list[str] | None,
    ) -> None:
        while flights:
            self._finish(flights.popleft(), tensors, differing)

    def _finish(
        self, flight: _Flight, tensors: Mapping[str, torch.Tensor], differing: list[str] | None
    ) -> None:
        try:
            if self._is_staged:
                left_s = max(_LEAST_WAIT_S, self._deadline - time.monotonic())
                flight.work.wait(timedelta(seconds=left_s))
            else:
                # With a limit the host would wait for the GPU; NCCL's own watch ends it.
                flight.work.wait()
        except RuntimeError as error:
            raise self._failure(flight.step, error, f"bucket {flight.step.message[0]}") from error
        if flight.staging is None:
            return
        if not flight.step.is_send:
            _unpack(flight, tensors, differing)
        self._staging.give_back(flight.staging)

    def _failure(self, step: Step, error: RuntimeError, where: str) -> MessageError:
        verb, side = ("send", "to") if step.is_send else ("receive", "from")
        is_lost = any(word in str(error).lower() for word in _LOST)
        return MessageError(
            f"{self._label} could not {verb} {step.parts[0].key} ({where}) {side} "
            f"{self._labels[step.peer]} within {self._limit_s:.3g} s: {error}",
            is_lost=is_lost,
            peer=step.peer,
        )


def choose_backend(device_ids: Sequence[str]) -> str:
    """NCCL where every rank has a GPU to itself, as it asks for; else gloo, by way of the host.

    Args:
        device_ids: of all ranks; empty: the CPU.
    """
    has_own = all(device_ids) and len(set(device_ids)) == len(device_ids)
    return "nccl" if has_own else "gloo"


def host_channel(context: WorkerContext, key: str) -> tuple[str, int]:
    """Open the store of a channel in this worker; gives host and port."""
    context.drop(("sync store", key))
    kept = context.keep(("sync store", key), lambda: _Store(context.host, context.timeout_s))
    return context.host, kept.store.port


def open_channel(context: WorkerContext, address: ChannelAddress, index: int) -> Failure | None:
    """Join a channel as endpoint `index`; returns when every rank has come, or one has not."""
    import torch.distributed as dist

    timeout = timedelta(seconds=address.timeout_s)
    context.drop(("sync channel", address.key))
    try:
        if index == address.members[0]:
            hosted = context.keep(
                ("sync store", address.key), lambda: _Store(context.host, address.timeout_s)
            )
            store = hosted.store
        else:
            # The store is up before anybody is sent here; one that is gone belongs to a sync that
            # has failed meanwhile, and torch would try for all of the timeout to reach it.
            socket.create_connection((address.host, address.port), address.timeout_s).close()
            store = dist.TCPStore(address.host, address.port, None, False, timeout)
        context.keep(("sync channel", address.key), lambda: Channel(address, index, store))
    except (RuntimeError, OSError) as error:
        labels = dict(zip(address.members, address.labels, strict=True))
        return Failure(
            f"{labels[index]} could not open its sync channel to {', '.join(labels.values())} "
            f"within {address.timeout_s:g} s: {error}"
        )
    return None


def _region(part: Part, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors[part.local_name][part.slices]


def _pack(step: Step, tensors: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> None:
    start = 0
    for part in step.parts:
        region = _region(part, tensors)
        buffer[start : start + region.numel()].view(region.shape).copy_(region)
        start += region.numel()


def _unpack(
    flight: _Flight, tensors: Mapping[str, torch.Tensor], differing: list[str] | None
) -> None:
    start = 0
    for part in flight.step.parts:
        region = _region(part, tensors)
        came = flight.buffer[start : start + region.numel()].view(region.shape)
        start += region.numel()
        if differing is None:
            region.copy_(came)
        elif not has_equal_bits(region, came.to(region.dtype).to(region.device)):
            differing.append(part.label)


def _dense_region(step: Step, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The one region of a step, if it lies dense and has the dtype of the wire."""
    if len(step.parts) != 1:
        return None
    region = _region(step.parts[0], tensors)
    is_plain = str(region.dtype) == f"torch.{step.dtype}" and region.is_contiguous()
    return region if is_plain else None
