"""Point-to-point messages between ranks of different models: a process group of their own.

Each rank keeps its end in its context. Steps run in the plan's order, two of them at a time: while
one message is on the wire the next is packed, or the last one unpacked. The earliest step that is
not finished anywhere has both its ends waiting for it, so no order of arrival can deadlock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from chatlearn.errors import SyncError
from chatlearn.sync.digest import has_equal_bits
from chatlearn.sync.programs import Part, Step
from chatlearn.sync.rank_calls import Failure

if TYPE_CHECKING:
    import torch

    from chatlearn.parallel.context import WorkerContext

__all__ = ["Channel", "ChannelAddress", "MessageError", "host_channel", "open_channel"]

# Messages of one pair of ranks arrive in the order they are sent, so one tag serves.
_TAG = 1
_MOST_IN_FLIGHT = 2
# What gloo and NCCL say where the other end is gone, not late.
_LOST = ("connection", "broken pipe", "remote process", "socket")


class MessageError(SyncError):
    """A message that did not come through.

    Attributes:
        is_lost: the other end is gone, which often only follows another rank's failure.
    """

    def __init__(self, text: str, *, is_lost: bool) -> None:
        super().__init__(text)
        self.is_lost = is_lost


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
        timeout_s: of every message.
    """

    key: str
    host: str
    port: int
    members: tuple[int, ...]
    labels: tuple[str, ...]
    backend: str
    timeout_s: float


class _Store:
    """The store that one rank of a channel hosts."""

    def __init__(self, host: str, timeout_s: float) -> None:
        import torch.distributed as dist

        timeout = timedelta(seconds=timeout_s)
        self.store = dist.TCPStore(host, 0, None, True, timeout, wait_for_workers=False)

    def close(self) -> None:
        """Let go of the store."""
        del self.store


@dataclass
class _Flight:
    """A step on its way: the work to wait for, and what is left to do then."""

    step: Step
    work: Any
    buffer: torch.Tensor
    is_in_place: bool

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
        self._timeout_s = address.timeout_s
        prefixed = dist.PrefixStore(address.key, store)
        rank, size = self._ranks[index], len(address.members)
        self._is_staged = address.backend == "gloo"
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
        differing: list[str] | None = None,
    ) -> None:
        """Work through the steps of this rank.

        Args:
            steps: in the plan's order.
            given: tensors to send from, by local name.
            taken: tensors to receive into, by local name; also what is passed on from.
            differing: where given, nothing is written: what differs from what came is listed.

        Raises:
            MessageError: a message failed; names both ranks and the tensor.
        """
        flights: deque[_Flight] = deque()
        own = {step.message for step in steps if not step.is_send}
        for number, step in enumerate(steps):
            if step.is_send and any(
                f.step.message == step.message for f in flights if f.is_awaited
            ):
                # What is passed on must have come.
                self._finish_all(flights, taken, differing)
            while len(flights) >= _MOST_IN_FLIGHT:
                self._finish(flights.popleft(), taken, differing)
            try:
                if step.is_send:
                    tensors = taken if step.message in own else given
                    flights.append(self._send(step, tensors))
                else:
                    flights.append(self._receive(step, taken, may_place=differing is None))
            except RuntimeError as error:
                raise self._failure(step, error, f"step {number + 1} of {len(steps)}") from error
        self._finish_all(flights, taken, differing)

    def _send(self, step: Step, tensors: Mapping[str, torch.Tensor]) -> _Flight:
        buffer = self._pack(step, tensors)
        work = self._group.send([buffer], self._ranks[step.peer], _TAG)
        return _Flight(step, work, buffer, is_in_place=False)

    def _receive(
        self, step: Step, tensors: Mapping[str, torch.Tensor], *, may_place: bool
    ) -> _Flight:
        import torch

        region = _dense_region(step, tensors)
        is_in_place = may_place and region is not None and not self._must_stage(region)
        if is_in_place and region is not None:
            buffer = region
        else:
            sample = tensors[step.parts[0].local_name]
            count = sum(_region(part, tensors).numel() for part in step.parts)
            device = torch.device("cpu") if self._is_staged else sample.device
            buffer = torch.empty(count, dtype=getattr(torch, step.dtype), device=device)
        work = self._group.recv([buffer], self._ranks[step.peer], _TAG)
        return _Flight(step, work, buffer, is_in_place)

    def _must_stage(self, tensor: torch.Tensor) -> bool:
        return self._is_staged and tensor.device.type != "cpu"

    def _pack(self, step: Step, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The step's parts as one dense tensor: the tensor itself where it is that already."""
        import torch

        region = _dense_region(step, tensors)
        if region is None:
            dtype = getattr(torch, step.dtype)
            regions = [_region(part, tensors) for part in step.parts]
            region = torch.empty(
                sum(r.numel() for r in regions), dtype=dtype, device=regions[0].device
            )
            start = 0
            for each in regions:
                region[start : start + each.numel()].view(each.shape).copy_(each)
                start += each.numel()
        return region.cpu() if self._must_stage(region) else region

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
            flight.work.wait()
        except RuntimeError as error:
            raise self._failure(flight.step, error, f"bucket {flight.step.message[0]}") from error
        if flight.step.is_send or flight.is_in_place:
            return
        start = 0
        for part in flight.step.parts:
            region = _region(part, tensors)
            came = flight.buffer[start : start + region.numel()].view(region.shape)
            start += region.numel()
            if differing is None:
                region.copy_(came)
            elif not has_equal_bits(region, came.to(region.dtype).to(region.device)):
                differing.append(part.label)

    def _failure(self, step: Step, error: RuntimeError, where: str) -> MessageError:
        verb, side = ("send", "to") if step.is_send else ("receive", "from")
        is_lost = any(word in str(error).lower() for word in _LOST)
        return MessageError(
            f"{self._label} could not {verb} {step.parts[0].key} ({where}) {side} "
            f"{self._labels[step.peer]} within {self._timeout_s:g} s: {error}",
            is_lost=is_lost,
        )


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
            store = dist.TCPStore(address.host, address.port, None, False, timeout)
        context.keep(("sync channel", address.key), lambda: Channel(address, index, store))
    except RuntimeError as error:
        labels = dict(zip(address.members, address.labels, strict=True))
        return Failure(
            f"{labels[index]} could not open its sync channel to {', '.join(labels.values())} "
            f"within {address.timeout_s:g} s: {error}"
        )
    return None


def _region(part: Part, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return tensors[part.local_name][part.slices]


def _dense_region(step: Step, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """The one region of a step, if it lies dense and has the dtype of the wire."""
    if len(step.parts) != 1:
        return None
    region = _region(step.parts[0], tensors)
    is_plain = str(region.dtype) == f"torch.{step.dtype}" and region.is_contiguous()
    return region if is_plain else None
