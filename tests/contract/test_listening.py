"""What workers listen at: only Ray's own server is open to the network."""

import psutil
import pytest

from chatlearn import BaseModule
from chatlearn.config import load_config
from chatlearn.runtime.contract import ModelSpec
from chatlearn.runtime.placement import DeviceInventory, build_requests, plan_placement
from chatlearn.runtime.ray_backend import RayBackend
from chatlearn.sync.channel import ChannelAddress, host_channel, open_channel

TWO_RANKS = {"models": {"pair": {"num_gpu": 2, "tensor_model_parallel_size": 2}}}


def find_listeners(_context):
    found = psutil.Process().net_connections("tcp")
    return sorted(connection.laddr.ip for connection in found if connection.status == "LISTEN")


@pytest.fixture
def ranks(ray_cluster, tmp_path):
    backend = RayBackend(tmp_path)
    config = load_config(TWO_RANKS)
    [request] = build_requests(config, ("pair",), ())
    spec = ModelSpec("pair", BaseModule("pair"), request.layout, request.num_replicas)
    placement = plan_placement([request], (), DeviceInventory(1, None, "logical"))
    try:
        [group] = backend.start([spec], placement, config)["pair"]
        yield lambda function, *args, **at: [
            backend.fetch(call, 30.0) for call in group.call(function, *args, **at)
        ]
    finally:
        backend.close()


def open_end(context, address):
    return open_channel(context, address, context.rank)


def test_stores_groups_and_channels_of_one_node_listen_at_loopback(ranks):
    import ray

    @ray.remote
    def look():  # here, so that a worker that is not ours needs not find this file
        found = psutil.Process().net_connections("tcp")
        return [connection.laddr.ip for connection in found if connection.status == "LISTEN"]

    plain_worker = ray.get(look.remote())
    [(host, port)] = ranks(host_channel, "sync", ranks=[0])
    address = ChannelAddress(
        "sync", host, port, (0, 1), ("pair.0", "pair.1"), "gloo", 30.0, 1 << 20
    )
    assert ranks(open_end, address) == [None, None]
    for rank, found in enumerate(ranks(find_listeners)):
        own = [ip for ip in found if ip not in plain_worker]
        assert len(found) - len(own) == len(plain_worker) == 1
        # The group of the world and that of the channel; on rank 0 also their stores.
        assert own == ["127.0.0.1"] * (4 if rank == 0 else 2)
