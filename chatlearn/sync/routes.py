"""Who sends each bucket to whom, with equal loads, and in which round. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest

from chatlearn.sync.records import LINKS, Bucket, Endpoint, Hop

__all__ = ["Route", "choose_routes", "find_link", "order_hops"]

_PROCESS, _DEVICE, _NODE, _NETWORK = range(len(LINKS))
_MOST_SWEEPS = 100


@dataclass(slots=True)
class Route:
    """One hop before it has its round: who sends to whom over which link."""

    source: int
    destination: int
    link: int


@dataclass(frozen=True)
class _Reach:
    """How the takers of a group of buckets can be reached.

    Attributes:
        local: takers with a holder on their own node: the taker, the link, the holders.
        remote: takers on nodes without a holder, node by node.
    """

    local: tuple[tuple[int, int, tuple[int, ...]], ...]
    remote: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Choice:
    """A route whose sender could have been another."""

    route: Route
    bucket: int
    candidates: tuple[int, ...]


class _Loads:
    """Bytes that each endpoint sends and receives, by kind of link."""

    def __init__(self, num_endpoints: int) -> None:
        self.sent = [[0] * num_endpoints for _ in LINKS]
        self.received = [0] * num_endpoints

    def least(self, link: int, candidates: Sequence[int], count: int) -> list[int]:
        """The `count` candidates that have sent least over a kind of link, in order of rank."""
        sent = self.sent[link]
        if len(candidates) == 1:
            return [candidates[0]]
        if count == 1:
            return [min(candidates, key=sent.__getitem__)]
        if count == len(candidates):
            return sorted(candidates, key=sent.__getitem__)
        return nsmallest(count, candidates, key=sent.__getitem__)


def choose_routes(endpoints: Sequence[Endpoint], buckets: Sequence[Bucket]) -> list[list[Route]]:
    """For each bucket the hops that bring it to every taker, each after those that it needs.

    Over each kind of link, holders of the same bucket end with loads that differ by one bucket
    at most: as long as giving a bucket to another holder evens loads out, that is done.
    """
    loads = _Loads(len(endpoints))
    reaches: dict[tuple[int, int], _Reach] = {}
    choices: list[_Choice] = []
    routes: list[list[Route]] = []
    for number, bucket in enumerate(buckets):
        holders = bucket.pieces[0].source.holders
        takers = bucket.pieces[0].destination.holders
        kind = (id(holders), id(takers))
        reach = reaches.get(kind)
        if reach is None:
            reach = reaches[kind] = _find_reach(endpoints, holders, takers)
        found = _route_local(reach, bucket.num_bytes, number, loads, choices)
        if reach.remote:
            found += _route_remote(
                endpoints, reach.remote, holders, number, bucket.num_bytes, loads, choices
            )
        routes.append(found)
    _even_out(buckets, loads, choices, routes)
    return routes


def order_hops(
    num_endpoints: int,
    buckets: Sequence[Bucket],
    turns: Sequence[int],
    routes: Sequence[Sequence[Route]],
) -> tuple[tuple[Hop, ...], dict[str, int]]:
    """Give every hop the earliest round in which both its ends are free and the bucket is there.

    Args:
        num_endpoints: how many take part.
        buckets: of the plan.
        turns: the order in which buckets are considered.
        routes: for each bucket.

    Returns:
        The hops by round, and the bytes by kind of link.
    """
    send_free = [0] * num_endpoints
    receive_free = [0] * num_endpoints
    sizes = [0] * len(LINKS)
    rounds: list[list[Hop]] = []
    for number in turns:
        there: dict[int, int] = {}
        size = buckets[number].num_bytes
        for route in routes[number]:
            source, destination, link = route.source, route.destination, route.link
            at = there.get(source, 0)
            if link == _NETWORK:
                at = max(at, send_free[source], receive_free[destination])
                send_free[source] = receive_free[destination] = at + 1
            there[destination] = at + 1
            sizes[link] += size
            while len(rounds) <= at:
                rounds.append([])
            rounds[at].append(Hop(at, number, source, destination, link))
    hops = tuple(hop for group in rounds for hop in group)
    return hops, dict(zip(LINKS, sizes, strict=True))


def _find_reach(
    endpoints: Sequence[Endpoint], holders: Sequence[int], takers: Sequence[int]
) -> _Reach:
    by_node: dict[str, list[int]] = {}
    for holder in holders:
        by_node.setdefault(endpoints[holder].node_id, []).append(holder)
    local: list[tuple[int, int, tuple[int, ...]]] = []
    remote: dict[str, list[int]] = {}
    for taker in takers:
        node = endpoints[taker].node_id
        if node in by_node:
            link, nearest = _nearest(endpoints, by_node[node], taker)
            local.append((taker, link, nearest))
        else:
            remote.setdefault(node, []).append(taker)
    return _Reach(tuple(local), tuple(tuple(found) for found in remote.values()))


def _nearest(
    endpoints: Sequence[Endpoint], near: Sequence[int], taker: int
) -> tuple[int, tuple[int, ...]]:
    """The shortest link from any of `near` (on the taker's node), and who offers it."""
    links = [find_link(endpoints[source], endpoints[taker]) for source in near]
    shortest = min(links)
    return shortest, tuple(s for s, link in zip(near, links, strict=True) if link == shortest)


def find_link(source: Endpoint, destination: Endpoint) -> int:
    """The kind of link between two endpoints of one node."""
    if source.process_id == destination.process_id:
        return _PROCESS
    is_one_device = source.device_id and source.device_id == destination.device_id
    return _DEVICE if is_one_device else _NODE


def _route_local(
    reach: _Reach, num_bytes: int, number: int, loads: _Loads, choices: list[_Choice]
) -> list[Route]:
    routes: list[Route] = []
    for taker, link, candidates in reach.local:
        (sender,) = loads.least(link, candidates, 1)
        route = Route(sender, taker, link)
        loads.sent[link][sender] += num_bytes
        if len(candidates) > 1:
            choices.append(_Choice(route, number, candidates))
        routes.append(route)
    return routes


def _route_remote(
    endpoints: Sequence[Endpoint],
    nodes: Sequence[tuple[int, ...]],
    holders: tuple[int, ...],
    number: int,
    num_bytes: int,
    loads: _Loads,
    choices: list[_Choice],
) -> list[Route]:
    """Across the network once to each node, then on within it."""
    senders = loads.least(_NETWORK, holders, min(len(holders), len(nodes)))
    routes: list[Route] = []
    within: list[Route] = []
    chain = list(senders)
    for place, takers in enumerate(nodes):
        lead = takers[0] if len(takers) == 1 else min(takers, key=loads.received.__getitem__)
        route = Route(chain[place], lead, _NETWORK)
        if place < len(senders) < len(holders):
            choices.append(_Choice(route, number, holders))
        loads.sent[_NETWORK][route.source] += num_bytes
        loads.received[lead] += num_bytes
        routes.append(route)
        chain.append(lead)
        for taker in takers:
            if taker != lead:
                link = find_link(endpoints[lead], endpoints[taker])
                within.append(Route(lead, taker, link))
                loads.sent[link][lead] += num_bytes
    return routes + within


def _even_out(
    buckets: Sequence[Bucket],
    loads: _Loads,
    choices: Sequence[_Choice],
    routes: Sequence[Sequence[Route]],
) -> None:
    """Give buckets to other holders as long as that evens loads out.

    Each change lowers the sum of the squared loads, so this ends.
    """
    for _ in range(_MOST_SWEEPS):
        has_changed = False
        for choice in choices:
            route, size = choice.route, buckets[choice.bucket].num_bytes
            sent = loads.sent[route.link]
            if sent[route.source] - sent[min(choice.candidates, key=sent.__getitem__)] <= size:
                continue
            # On the network no holder sends one bucket twice.
            busy = (
                {other.source for other in routes[choice.bucket] if other.link == _NETWORK}
                if route.link == _NETWORK
                else frozenset[int]()
            )
            free = [holder for holder in choice.candidates if holder not in busy]
            best = min(free, key=sent.__getitem__, default=route.source)
            if sent[route.source] - sent[best] > size:
                sent[route.source] -= size
                sent[best] += size
                route.source = best
                has_changed = True
        if not has_changed:
            return
