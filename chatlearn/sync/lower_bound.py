"""What no plan of a weight sync can beat on a stated cluster, from the two layouts alone. Pure.

It reads who holds and who wants each box, and none of a plan's choices: not its buckets, its
senders, nor which rank of a node receives for the others.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from chatlearn.sync.records import Endpoint, SyncPlan

__all__ = ["bound_seconds"]


@dataclass(frozen=True)
class _Demand:
    """What the same takers of one node want from the same holders.

    Attributes:
        holders: indices of endpoints.
        takers: those of one node.
        is_near: a holder is on that node.
        num_bytes: of one copy.
    """

    holders: tuple[int, ...]
    takers: tuple[int, ...]
    is_near: bool
    num_bytes: int


def bound_seconds(
    plan: SyncPlan, network: float, copy_rate: Callable[[Endpoint, Endpoint], float]
) -> float:
    """The least time of any plan in which nothing crosses to a node that has it.

    It is the largest of these times. To receive: what takers of a node want and none of its ranks
    holds, over the network of all of them. To send: what only certain holders have and another
    node wants, over the network of all of them. To copy: what a taker's own node holds; and of
    what does not lie there, all copies but the first, shared by the ranks that want it.

    Args:
        plan: of the two layouts; what it chose does not count.
        network: bytes per second of one rank, in one direction.
        copy_rate: bytes per second from one rank to another of its node.
    """
    endpoints = plan.endpoints
    ranks_of = Counter(endpoint.node_id for endpoint in endpoints[plan.num_sources :])
    received: Counter[tuple[int, ...]] = Counter()
    into_node: Counter[str] = Counter()
    leaving: Counter[tuple[int, ...]] = Counter()
    own_s: dict[int, float] = defaultdict(float)
    shared_s: dict[tuple[int, ...], float] = defaultdict(float)
    node_s: dict[str, float] = defaultdict(float)
    for demands in _demands(plan):
        far = [demand for demand in demands if not demand.is_near]
        if far:
            leaving[far[0].holders] += far[0].num_bytes
        for demand in demands:
            node, takers, size = (
                endpoints[demand.takers[0]].node_id,
                demand.takers,
                demand.num_bytes,
            )
            near = [at for at in demand.holders if endpoints[at].node_id == node]
            rates = _best_rates(endpoints, (*near, *takers), takers, copy_rate)
            if demand.is_near:
                for taker, rate in zip(takers, rates, strict=True):
                    own_s[taker] += size / rate
                node_s[node] += sum(size / rate for rate in rates)
                continue
            received[takers] += size
            into_node[node] += size
            # The slowest to copy may be the one that receives.
            copies_s = sum(sorted(size / rate for rate in rates)[:-1])
            shared_s[takers] += copies_s
            node_s[node] += copies_s
    bounds = [size / (len(ranks) * network) for ranks, size in received.items()]
    bounds += [size / (len(ranks) * network) for ranks, size in leaving.items()]
    bounds += [size / (ranks_of[node] * network) for node, size in into_node.items()]
    bounds += [seconds / len(ranks) for ranks, seconds in shared_s.items()]
    bounds += [seconds / ranks_of[node] for node, seconds in node_s.items()]
    return max([*bounds, *own_s.values()], default=0.0)


def _demands(plan: SyncPlan) -> Iterator[list[_Demand]]:
    """For each pair of holders and takers what each node wants."""
    sizes: dict[tuple[int, int], int] = {}
    ends: dict[tuple[int, int], tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for bucket in plan.buckets:
        # Cells with the same holders share one tuple, so its identity stands for it.
        pair = bucket.pieces[0].source.holders, bucket.pieces[0].destination.holders
        kind = id(pair[0]), id(pair[1])
        ends[kind] = pair
        sizes[kind] = sizes.get(kind, 0) + bucket.num_bytes
    for kind, (holders, takers) in ends.items():
        nodes = {plan.endpoints[at].node_id for at in holders}
        by_node: dict[str, list[int]] = {}
        for taker in takers:
            by_node.setdefault(plan.endpoints[taker].node_id, []).append(taker)
        yield [
            _Demand(holders, tuple(found), node in nodes, sizes[kind])
            for node, found in by_node.items()
        ]


def _best_rates(
    endpoints: Sequence[Endpoint],
    sources: Sequence[int],
    takers: Sequence[int],
    copy_rate: Callable[[Endpoint, Endpoint], float],
) -> list[float]:
    """For each taker the fastest copy from any other rank that may have the box by then."""
    return [
        max(
            (copy_rate(endpoints[at], endpoints[taker]) for at in sources if at != taker),
            default=float("inf"),
        )
        for taker in takers
    ]
