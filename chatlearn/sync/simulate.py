"""How long a plan takes on a stated cluster, and how long any plan must take there. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from chatlearn.sync.lower_bound import bound_seconds
from chatlearn.sync.records import LINKS, SyncPlan
from chatlearn.sync.routes import find_link

__all__ = ["CPU_HOST", "H100_CLUSTER", "ClusterSpeeds", "SimulatedSync", "simulate_sync"]

_NETWORK = LINKS.index("network")


@dataclass(frozen=True)
class ClusterSpeeds:
    """Bytes per second of one rank over each kind of link, in one direction.

    Attributes:
        process: a copy within a process.
        device: between two processes on one device (or, on a host without GPUs, memory).
        node: between two devices of a node.
        network: one rank's share of its node's network.
        latency_s: of one message across the network; a rank copies bucket after bucket without.
    """

    process: float
    device: float
    node: float
    network: float
    latency_s: float

    def seconds(self, link: int, num_bytes: int) -> float:
        """Of one hop by itself."""
        return (self.latency_s if link == _NETWORK else 0.0) + num_bytes / self.rate(link)

    def rate(self, link: int) -> float:
        """Bytes per second over a kind of link (index into `LINKS`)."""
        return (self.process, self.device, self.node, self.network)[link]


# Eight H100 a node: memory at 3.35 TB/s reads and writes a copy; NVLink 4 at 450 GB/s and one
# 400 Gb/s adapter for each GPU, both at the 85 per cent that large messages reach.
H100_CLUSTER = ClusterSpeeds(1.5e12, 1.5e12, 380e9, 42e9, 20e-6)
# A host without GPUs: one copy through memory; gloo over 25 Gb/s Ethernet.
CPU_HOST = ClusterSpeeds(8e9, 8e9, 8e9, 2e9, 100e-6)


@dataclass(frozen=True)
class SimulatedSync:
    """What a plan takes.

    Attributes:
        seconds: until the last hop is done.
        lower_bound_s: what no plan for the same two layouts can beat (see `bound_seconds`).
        network_s: until the last hop over the network is done.
    """

    seconds: float
    lower_bound_s: float
    network_s: float


def simulate_sync(plan: SyncPlan, speeds: ClusterSpeeds) -> SimulatedSync:
    """Let every hop start as soon as both its ends are free and the bucket is there.

    A rank sends one bucket over the network at a time, and receives one; meanwhile it copies what
    is near. Taking out of another rank's memory costs the taker's time only.
    """
    count = len(plan.endpoints)
    send_free, receive_free, copy_free = [0.0] * count, [0.0] * count, [0.0] * count
    there: dict[tuple[int, int], float] = {}
    end = network_end = 0.0
    for hop in plan.hops:
        took = speeds.seconds(hop.link, plan.buckets[hop.bucket].num_bytes)
        start = there.get((hop.bucket, hop.source), 0.0)
        if hop.link == _NETWORK:
            start = max(start, send_free[hop.source], receive_free[hop.destination])
            send_free[hop.source] = receive_free[hop.destination] = start + took
            network_end = max(network_end, start + took)
        else:
            start = max(start, copy_free[hop.destination])
            copy_free[hop.destination] = start + took
        there[hop.bucket, hop.destination] = start + took
        end = max(end, start + took)
    least = bound_seconds(
        plan, speeds.network, lambda one, other: speeds.rate(find_link(one, other))
    )
    return SimulatedSync(end, least, network_end)
