"""Where stores, groups and listeners of this project listen."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from chatlearn.errors import PlacementError
from chatlearn.parallel import sockets

GROUP = """
import psutil, sys
from datetime import timedelta
import torch.distributed as dist
from chatlearn.parallel.sockets import keep_groups_at
keep_groups_at(sys.argv[1])
group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))
print(*(c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"))
"""


def listening_at(port):
    found = psutil.Process().net_connections("tcp")
    return [c.laddr.ip for c in found if c.status == "LISTEN" and c.laddr.port == port]


def own_addresses():
    """Loopback, and an address by which others reach this machine, where it has one."""
    outward = sockets._outward_address()
    return ["127.0.0.1", *([outward] if outward else [])]


@pytest.mark.parametrize("host", own_addresses())
def test_a_store_listens_at_its_host_and_nowhere_else(host):
    import torch.distributed as dist

    store = sockets.open_store(host, 10.0)
    assert listening_at(store.port) == [host]
    other = dist.TCPStore(host, store.port, None, is_master=False)
    other.set("key", "value")
    assert store.get("key") == b"value"


def test_torchs_own_store_would_listen_everywhere():
    """Why `open_store` is there; where this fails, torch no longer does."""
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    assert listening_at(store.port) == ["::"]


def test_a_store_at_an_address_of_another_machine_is_refused():
    with pytest.raises(PlacementError, match="nothing can listen at 203.0.113.9 .*--node-ip"):
        sockets.open_store("203.0.113.9", 1.0)


def groups_of(host, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.endswith("SOCKET_IFNAME")}
    return subprocess.run(
        [sys.executable, "-c", GROUP, host],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout.split()


@pytest.mark.parametrize("host", own_addresses())
def test_a_group_listens_at_the_nodes_address_and_nowhere_else(host):
    assert groups_of(host) == [host]


def test_an_interface_that_the_user_chose_stays():
    own = {"GLOO_SOCKET_IFNAME": "lo", "SOCKET_IFNAMES_OF_CHATLEARN": ""}
    assert groups_of(own_addresses()[-1], **own) == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("host", "leads_to", "expected"),
    [
        ("localhost", "127.0.0.1", ("127.0.0.1",)),
        ("127.0.0.1", "127.0.0.1", ("127.0.0.1",)),
        # A line in /etc/hosts leads to loopback here, and to the network elsewhere.
        ("node0", "127.0.1.1", ("127.0.1.1", "10.0.0.5")),
        ("node0", "10.0.0.5", ("10.0.0.5",)),
        # A service's address is on no interface.
        ("service", "10.96.0.1", ("10.0.0.5",)),
    ],
)
def test_a_machine_listens_where_others_call_it(monkeypatch, host, leads_to, expected):
    monkeypatch.setattr(socket, "gethostbyname", lambda _: leads_to)
    monkeypatch.setattr(sockets, "_interfaces", lambda: {"127.0.0.1": "lo", "10.0.0.5": "eth0"})
    monkeypatch.setattr(sockets, "_outward_address", lambda: "10.0.0.5")
    assert sockets.find_own_addresses(host) == expected


def test_what_an_earlier_process_chose_is_no_users_choice(monkeypatch):
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "SOCKET_IFNAMES_OF_CHATLEARN")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sockets, "_interfaces", lambda: {"127.0.0.1": "lo", "10.0.0.1": "eth0"})
    sockets.keep_groups_at("127.0.0.1")
    assert [os.environ.get(name) for name in names[:2]] == ["lo", "=lo"]
    sockets.keep_groups_at("10.0.0.1")
    assert [os.environ.get(name) for name in names[:2]] == ["eth0", None]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine")
    sockets.keep_groups_at("127.0.0.1")
    assert [os.environ.get(name) for name in names[:2]] == ["mine", "=lo"]
