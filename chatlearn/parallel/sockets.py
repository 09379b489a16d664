# pyright: standard, reportPrivateImportUsage=false
"""Where sockets of this project listen: at the node's own address, never on every interface.

A node's own address is the one by which other nodes reach it, loopback where there is one node.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

from chatlearn.errors import PlacementError

if TYPE_CHECKING:
    from torch.distributed import TCPStore

__all__ = ["find_own_addresses", "keep_groups_at", "listen_at", "open_store"]

_LOOPBACK = "127.0.0.1"
_CHOSEN = "SOCKET_IFNAMES_OF_CHATLEARN"
_LOOPBACK_NAMES = (_LOOPBACK, "localhost", "::1")
# Any address outside: nothing is sent there.
_OUTSIDE = ("8.8.8.8", 53)


def listen_at(host: str, port: int = 0) -> socket.socket:
    """A socket that listens at one address.

    Args:
        host: an address of this machine.
        port: 0: any free one.

    Raises:
        OSError: the port is in use, or the address is none of this machine's.
    """
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    return socket.create_server((str(address[0]), port), family=family, backlog=128)


def open_store(host: str, timeout_s: float) -> TCPStore:
    """A store in this process, at a free port of `host`; torch's own listens everywhere.

    Args:
        host: the node's address.
        timeout_s: limit of what is asked of the store.

    Raises:
        PlacementError: no interface of this machine has the address.
    """
    import torch.distributed as dist

    try:
        server = listen_at(host)
    except OSError as error:
        raise PlacementError(
            f"nothing can listen at {host} ({error.strerror or error}): it must be an address of "
            "one of this machine's interfaces; start Ray with --node-ip-address=<such an address>"
        ) from error
    port = server.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        None,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


def keep_groups_at(host: str) -> None:
    """Let this process's groups listen at the interface of `host`, unless the user chose one.

    gloo takes the address of the machine's name otherwise. NCCL is told within one node only:
    across nodes it looks for the fast interfaces by itself, and listens at their addresses.

    Args:
        host: the node's address.
    """
    name = _interfaces().get(host)
    if name is None:
        return
    is_loopback = ipaddress.ip_address(host).is_loopback
    # What is inherited from a process that chose like this is not the user's choice.
    chosen = os.environ.get(_CHOSEN, "").split(",")
    wanted = {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}" if is_loopback else ""}
    ours: list[str] = []
    for variable, value in wanted.items():
        known = os.environ.get(variable)
        if known is not None and f"{variable}={known}" not in chosen:
            continue
        os.environ.pop(variable, None)
        if value:
            os.environ[variable] = value
            ours.append(f"{variable}={value}")
    os.environ[_CHOSEN] = ",".join(ours)


def find_own_addresses(host: str) -> tuple[str, ...]:
    """The addresses at which this machine listens to those who call it `host`.

    A name may lead to loopback here and to the network elsewhere (a line in /etc/hosts); then both
    count. It may also lead to an address that only others see (a service's); then this machine's
    own one counts.

    Raises:
        OSError: the name is not known.
    """
    address = socket.gethostbyname(host)
    is_loopback = ipaddress.ip_address(address).is_loopback
    if host in _LOOPBACK_NAMES or (is_loopback and host == address):
        return (address,)
    if not is_loopback and address in _interfaces():
        return (address,)
    outward = _outward_address()
    found = [address] if is_loopback else []
    return tuple(dict.fromkeys([*found, *([outward] if outward else [])])) or (_LOOPBACK,)


def _interfaces() -> dict[str, str]:
    """Names of interfaces by their addresses."""
    import psutil

    return {entry.address: name for name, found in psutil.net_if_addrs().items() for entry in found}


def _outward_address() -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_OUTSIDE)
        except OSError:
            return None
        return str(probe.getsockname()[0])
