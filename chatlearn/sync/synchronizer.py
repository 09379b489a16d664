"""Keeps one destination model's weights equal to its source's: plan once, move every time."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chatlearn.errors import SyncError, WorkerError
from chatlearn.sync.channel import ChannelAddress, choose_backend, host_channel, open_channel
from chatlearn.sync.plan import DEFAULT_BUCKET_BYTES, plan_sync
from chatlearn.sync.programs import RankProgram, build_programs, first_awaited, first_taken
from chatlearn.sync.rank_calls import RankCalls
from chatlearn.sync.records import LINKS, Endpoint, Hop, SyncPlan
from chatlearn.sync.state import Offer, SyncCall
from chatlearn.sync.transport import (
    commit_weights,
    describe_endpoint,
    exchange_weights,
    forget_sync,
    install_programs,
    is_shareable,
    offer_weights,
    pull_early,
    pull_weights,
    spoil_weights,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from chatlearn.runtime.contract import Backend, PendingCall, WorkerGroup

__all__ = ["SyncReport", "SyncSettings", "WeightSynchronizer"]

_PROCESS, _DEVICE, _NODE, _NETWORK = range(len(LINKS))
# Ranks notice a peer that does not come before the driver notices that they are late.
_RANK_SHARE = 0.8


@dataclass(frozen=True)
class SyncSettings:
    """How weights are moved.

    Attributes:
        timeout_s: limit of a whole sync, seconds.
        mode: `in_place`, or `double`: into a second copy, which is put into force at the end.
        checks: `false`, `digest` or `full`, as in `SyncCall`.
        transport: `auto`, or `collective`: nothing through shared memory or IPC.
        bucket_bytes: most bytes of one bucket.
        left_out: the destination's `left_out_weights`.
    """

    timeout_s: float
    mode: str = "in_place"
    checks: str = "false"
    transport: str = "auto"
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    left_out: Collection[str] = ()


@dataclass(frozen=True)
class SyncReport:
    """What one sync did.

    Attributes:
        start_s: seconds since the epoch.
        end_s: seconds since the epoch.
        num_bytes: payload that was moved.
    """

    start_s: float
    end_s: float
    num_bytes: int

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.end_s - self.start_s


@dataclass(frozen=True)
class _Ready:
    """What `prepare` has made.

    Attributes:
        full: the plan of everything.
        trained: the plan of what training changes; None where that is everything.
        programs: of `full`.
        trained_programs: of `trained`, else of `full`.
    """

    full: SyncPlan
    trained: SyncPlan | None
    programs: tuple[RankProgram, ...]
    trained_programs: tuple[RankProgram, ...]

    def plan_of(self, call: SyncCall) -> SyncPlan:
        """The plan that a sync follows."""
        return self.full if call.is_full or self.trained is None else self.trained


class WeightSynchronizer:
    """Moves the weights of one model to every replica of another.

    Args:
        backend: runs the calls.
        sources: worker groups of the model that is trained.
        destinations: worker groups of its inference twin.
        settings: how.
        namings: the naming of the weights of source and destination, as their modules say.
    """

    def __init__(
        self,
        backend: Backend,
        sources: Sequence[WorkerGroup],
        destinations: Sequence[WorkerGroup],
        settings: SyncSettings,
        namings: tuple[str, str] = ("", ""),
    ) -> None:
        self._settings = settings
        self._namings = namings
        self._key = f"{sources[0].model_name} -> {destinations[0].model_name}"
        self._num_sources = sum(group.layout.world_size for group in sources)
        self._ranks = RankCalls(
            backend, (*sources, *destinations), f"weight sync {self._key}", settings.timeout_s
        )
        self._ready: _Ready | None = None
        self._must_be_full = True
        self._must_plan_anew = False
        self._is_channel_open = False
        self._turn = 0

    @property
    def plan(self) -> SyncPlan:
        """The plan of a full sync; `prepare` makes it."""
        return self._prepared.full

    def prepare(self) -> None:
        """Gather the descriptions, plan, choose transports, and open the channel.

        Raises:
            SyncError: the two models do not fit together.
        """
        endpoints = self._describe()
        sources, destinations = endpoints[: self._num_sources], endpoints[self._num_sources :]
        size = self._settings.bucket_bytes
        left_out = self._settings.left_out
        full = plan_sync(sources, destinations, size, left_out=left_out)
        trained: SyncPlan | None = None
        if any(endpoint.frozen for endpoint in sources):
            trained = plan_sync(sources, destinations, size, skip_frozen=True, left_out=left_out)
        is_sent = self._choose_transports(full)
        programs = build_programs(full, is_sent)
        others = build_programs(trained, is_sent) if trained is not None else None
        self._install(programs, others)
        self._ready = _Ready(full, trained, programs, others or programs)
        self._ranks.awaited, self._ranks.taken = first_awaited(programs), first_taken(programs)
        self._open_channel()
        self._must_plan_anew = False

    def sync(self, version: int, held: int | None = None) -> SyncReport:
        """Move the weights; the destinations have them all when this returns.

        After a sync that failed, the next one moves everything anew, over a new channel. So does
        one whose sources freeze other weights than before, by a new plan.

        Args:
            version: number of the weights, given to the destinations' modules.
            held: the version that every source must have by its own count; None: any, if it is the
                same on all.

        Raises:
            WorkerError: a rank failed; its message names the tensor.
            WaitTimeoutError: a rank did not answer in time; names it and the tensor awaited.
            SyncError: a message between two ranks failed; names both and the tensor. Or a source's
                weights are older or newer than they should be; names it.
        """
        start_s = time.time()
        settings = self._settings
        if self._must_plan_anew:
            self.prepare()
        if not self._is_channel_open:
            self._open_channel()
        call = SyncCall(
            self._key,
            version,
            self._must_be_full,
            settings.mode == "double",
            settings.checks,
            self._turn,
            not any(endpoint.device_id for endpoint in self._prepared.full.endpoints),
        )
        self._must_be_full = True
        is_served = not call.is_double
        givers = range(self._num_sources)
        takers = range(self._num_sources, self._ranks.count)
        deadline = self._ranks.deadline()
        try:
            early = self._start_early(call)
            offers = self._offer(call, givers, deadline)
            self._ranks.gather(early, deadline, "take weights")
            self._check_versions(offers, held)
            if self._are_others_frozen(offers):
                self._must_plan_anew = True
                self.prepare()
                call = replace(call, is_full=True)
                offers = self._offer(call, givers, deadline)
            self._move(call, offers, deadline)
            if settings.checks == "full":
                check = replace(call, is_check=True)
                self._move(check, self._offer(check, givers, deadline), deadline)
            if call.is_double:
                is_served = True
                self._ranks.run(
                    commit_weights, takers, deadline, "switch to them", lambda _: (call,)
                )
        except BaseException:
            self._is_channel_open = False
            if is_served:
                reason = f"the weights are half new: sync {self._key} to version {version} failed"
                self._ranks.tell(spoil_weights, takers, reason)
            raise
        self._must_be_full = False
        self._turn += 1
        return SyncReport(start_s, time.time(), self._prepared.plan_of(call).num_bytes)

    def close(self) -> None:
        """Forget the plan; before any later call the workers let go of what they keep for it."""
        self._ready = None
        self._is_channel_open = False
        self._ranks.tell(forget_sync, range(self._ranks.count), self._key)

    @property
    def _prepared(self) -> _Ready:
        if self._ready is None:
            raise SyncError(f"the sync {self._key} has not been prepared")
        return self._ready

    def _start_early(self, call: SyncCall) -> dict[int, PendingCall]:
        """Let destinations copy while the sources prepare their offers, where that is safe."""
        ready = self._prepared
        programs = ready.programs if call.is_full else ready.trained_programs
        endpoints = ready.full.endpoints
        # On a GPU a source's last kernels may still run when its call has returned; and some
        # sources compute what is taken when they are asked for it.
        is_unsafe = any(endpoint.device_id or endpoint.is_late for endpoint in endpoints)
        if is_unsafe or any(program.steps for program in programs):
            return {}
        takers = range(self._num_sources, self._ranks.count)
        return self._ranks.start(pull_early, takers, lambda _: (call,))

    def _are_others_frozen(self, offers: Mapping[int, Offer]) -> bool:
        """Whether a source freezes other weights than when the sync was planned."""
        endpoints = self._prepared.full.endpoints
        return any(offer.frozen != endpoints[at].frozen for at, offer in offers.items())

    def _move(self, call: SyncCall, offers: dict[int, Offer], deadline: float) -> None:
        ready = self._prepared
        programs = ready.programs if call.is_full else ready.trained_programs
        stepping = [program.index for program in programs if program.steps]
        if stepping:
            limit_s = _RANK_SHARE * max(0.0, deadline - time.monotonic())
            self._ranks.run(
                exchange_weights, stepping, deadline, "exchange weights", lambda _: (call, limit_s)
            )
        relaying = {p.index for p in programs if p.is_destination and (p.exported or p.lent)}
        if relaying:
            offers = {**offers, **self._offer(call, relaying, deadline)}
        takers = [program.index for program in ready.programs if program.is_destination]
        wanted = {
            at: tuple(offers[i] for i in ready.programs[at].sources | programs[at].sources)
            for at in takers
        }
        self._ranks.run(
            pull_weights, takers, deadline, "take weights", lambda at: (call, wanted[at])
        )

    def _offer(self, call: SyncCall, ranks: Collection[int], deadline: float) -> dict[int, Offer]:
        found = self._ranks.run(offer_weights, ranks, deadline, "offer weights", lambda _: (call,))
        return {offer.index: offer for offer in found.values()}

    def _check_versions(self, offers: Mapping[int, Offer], held: int | None) -> None:
        """A source that has missed an update, or made one more, must not be taken from."""
        found = Counter(offer.version for offer in offers.values())
        awaited = held if held is not None else found.most_common(1)[0][0]
        others = [offer for offer in offers.values() if offer.version != awaited]
        if others:
            named = ", ".join(f"{offer.label} has {offer.version}" for offer in others[:6])
            raise SyncError(
                f"weight sync {self._key}: the weights of every source should have version "
                f"{awaited} (updates made, or the number of the last sync), but {named}: its calls "
                "were not those of the other ranks; go back to a checkpoint"
            )

    def _describe(self) -> list[Endpoint]:
        """Descriptions in one naming: the destination's, else the source's."""
        source, destination = self._namings
        if source == destination:
            return self._ask_descriptions(None, None)
        try:
            return self._ask_descriptions(destination, None)
        except WorkerError as error:
            if error.is_death:
                raise
            try:
                return self._ask_descriptions(None, source)
            except WorkerError:
                raise error from None

    def _ask_descriptions(self, source: str | None, destination: str | None) -> list[Endpoint]:
        found = self._ranks.run(
            describe_endpoint,
            range(self._ranks.count),
            self._ranks.deadline(),
            "describe their weights",
            lambda at: (source if at < self._num_sources else destination,),
        )
        return [found[at] for at in range(self._ranks.count)]

    def _choose_transports(self, plan: SyncPlan) -> Callable[[Hop], bool]:
        """Whether a hop goes over the channel: across nodes, or where nothing can be shared."""
        if self._settings.transport == "collective":
            return lambda hop: hop.link != _PROCESS
        endpoints = plan.endpoints
        # On GPUs a device of the same node may be invisible here: only the own one is opened.
        opened = {_DEVICE, _NODE} if not any(e.device_id for e in endpoints) else {_DEVICE}
        names: dict[int, set[str]] = {}
        for hop in plan.hops:
            if hop.link in opened:
                for piece in plan.buckets[hop.bucket].pieces:
                    is_own = hop.source < plan.num_sources
                    cell = piece.source if is_own else piece.destination
                    shard = cell.shards[plan.groups[hop.source]]
                    names.setdefault(hop.source, set()).add(shard.local_name)
        empty = RankProgram(0, is_destination=False)
        if names:
            self._install((empty,) * self._ranks.count, None)
        is_double = self._settings.mode == "double"
        shared = self._ranks.run(
            is_shareable,
            names,
            self._ranks.deadline(),
            "share their weights",
            lambda at: (self._key, sorted(names[at]), is_double and at >= plan.num_sources),
        )
        return lambda hop: (
            hop.link == _NETWORK
            or (hop.link != _PROCESS and not (hop.link in opened and shared.get(hop.source)))
        )

    def _install(
        self, programs: Sequence[RankProgram], others: Sequence[RankProgram] | None
    ) -> None:
        self._ranks.run(
            install_programs,
            range(len(programs)),
            self._ranks.deadline(),
            "prepare",
            lambda at: (self._key, programs[at], others[at] if others is not None else None),
        )

    def _open_channel(self) -> None:
        ready = self._prepared
        members = tuple(program.index for program in ready.programs if program.steps)
        if not members:
            self._is_channel_open = True
            return
        deadline = self._ranks.deadline()
        first = members[0]
        found = self._ranks.run(
            host_channel, [first], deadline, "open a store", lambda _: (self._key,)
        )
        host, port = found[first]
        endpoints = ready.full.endpoints
        address = ChannelAddress(
            self._key,
            host,
            port,
            members,
            tuple(endpoints[member].label for member in members),
            choose_backend([endpoints[member].device_id for member in members]),
            _RANK_SHARE * self._settings.timeout_s,
            2 * self._settings.bucket_bytes,
        )
        self._ranks.run(open_channel, members, deadline, "open a channel", lambda at: (address, at))
        self._is_channel_open = True
