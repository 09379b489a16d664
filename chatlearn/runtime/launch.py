"""Builds a Ray cluster out of the processes that torchrun started.

torchrun starts the user's script on every node. Global rank 0 starts Ray's head and goes on as the
driver. The first process of every other node joins its node to the cluster and waits; all other
processes only wait. They end with the driver, with its exit code.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.errors import PlacementError
from chatlearn.runtime.ray_cluster import prepare_token

if TYPE_CHECKING:
    from chatlearn.config import Config

__all__ = ["join_torchrun_cluster"]

_JOINED = "CHATLEARN_TORCHRUN_JOINED"
_POLL_S = 1.0


def join_torchrun_cluster(config: Config) -> None:
    """Under torchrun: build the cluster. Returns in global rank 0 only; elsewhere a no-op.

    The processes meet at a store on `MASTER_ADDR`, port `MASTER_PORT` + 1
    (`CHATLEARN_STORE_PORT` overrides it).

    Raises:
        PlacementError: the nodes did not come together within `runtime.startup_timeout_s`.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get(_JOINED):
        return
    os.environ[_JOINED] = "1"
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    timeout_s = config.runtime.startup_timeout_s
    rank = int(os.environ["RANK"])
    is_node_leader = os.environ.get("LOCAL_RANK", "0") == "0"
    store = _open_store(rank, timeout_s)
    if rank == 0:
        _drive(store, timeout_s)
        return
    process = _join_node(store, timeout_s) if is_node_leader else None
    sys.exit(_wait_for_driver(store, process))


def _open_store(rank: int, timeout_s: float) -> Any:
    import torch.distributed as dist

    host = os.environ["MASTER_ADDR"]
    port = int(os.environ.get("CHATLEARN_STORE_PORT") or int(os.environ["MASTER_PORT"]) + 1)
    timeout = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(host, port, None, rank == 0, timeout, wait_for_workers=False)
    except RuntimeError as error:
        raise PlacementError(
            f"rank {rank} cannot reach the store at {host}:{port}: {error}. Is the port in use? "
            "Choose another with CHATLEARN_STORE_PORT"
        ) from error


def _drive(store: Any, timeout_s: float) -> None:
    """Start the head, tell the others, and make this process the driver."""
    prepare_token()
    host = os.environ["MASTER_ADDR"]
    port = os.environ.get("RAY_PORT") or str(int(os.environ["MASTER_PORT"]) + 2)
    head = _start_ray(["--head", f"--node-ip-address={_own_address(host)}", f"--port={port}"])
    os.environ["RAY_ADDRESS"] = f"{_own_address(host)}:{port}"
    atexit.register(_end, store, head)
    store.set("token", _read_token())
    store.set("address", os.environ["RAY_ADDRESS"])
    num_nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    _await_nodes(num_nodes, head, timeout_s)


def _await_nodes(num_nodes: int, head: subprocess.Popen[bytes], timeout_s: float) -> None:
    from chatlearn.runtime.ray_cluster import count_cluster_devices, join_cluster

    deadline = time.monotonic() + timeout_s
    found, failure = 0, ""
    while time.monotonic() < deadline:
        if head.poll() is not None:
            raise PlacementError(f"Ray's head ended with exit code {head.returncode}: port in use?")
        try:
            join_cluster(timeout_s)
            found = count_cluster_devices()[0]
        except PlacementError as error:
            failure = f": {error}"
        if found >= num_nodes:
            return
        time.sleep(_POLL_S)
    raise PlacementError(f"{found} of {num_nodes} nodes joined within {timeout_s:g} s{failure}")


def _join_node(store: Any, timeout_s: float) -> subprocess.Popen[bytes] | None:
    """Join this node to the driver's cluster."""
    store.wait(["token", "address"], timedelta(seconds=timeout_s))
    folder = Path(tempfile.mkdtemp(prefix="chatlearn-token-"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_bytes(store.get("token"))
    os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    return _start_ray([f"--address={store.get('address').decode()}"])


def _start_ray(arguments: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments]
    command += ["--include-dashboard=false"] if "--head" in arguments else []
    command += ["--disable-usage-stats"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for_driver(store: Any, process: subprocess.Popen[bytes] | None) -> int:
    """Until the driver says its exit code, or is gone."""
    code = 1
    while True:
        try:
            if store.check(["exit_code"]):
                code = int(store.get("exit_code"))
                break
        except RuntimeError:
            break
        time.sleep(_POLL_S)
    if process is not None:
        _stop(process)
    return code


def _end(store: Any, head: subprocess.Popen[bytes]) -> None:
    code = 1 if sys.exc_info()[0] is not None or hasattr(sys, "last_value") else 0
    store.set("exit_code", str(code))
    time.sleep(2 * _POLL_S)
    _stop(head)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()


def _read_token() -> bytes:
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if path:
        return Path(path).read_bytes()
    return os.environ.get("RAY_AUTH_TOKEN", "").encode()


def _own_address(host: str) -> str:
    import socket

    return socket.gethostbyname(host)
