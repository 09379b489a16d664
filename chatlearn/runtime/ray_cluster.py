# pyright: standard, reportPrivateImportUsage=false
"""Joins the Ray cluster that is there, or starts one for this run and stops it.

A cluster that this project starts asks for a token (`chatlearn.runtime.ray_token`).
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.config.secrets import is_secret_variable
from chatlearn.errors import ConfigError, PlacementError
from chatlearn.runtime.freed_memory import build_allocator_environment
from chatlearn.runtime.ray_token import prepare_token

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from chatlearn.config import Config, RuntimeEnvConfig

__all__ = [
    "choose_object_store",
    "count_cluster_devices",
    "find_worker_secrets",
    "join_cluster",
    "leave_cluster",
    "object_store_bytes",
    "start_cluster",
]

_STORE_BYTES = 1 << 30
_SMALLEST_STORE_BYTES = 80 << 20
_POLL_S = 0.2


def choose_object_store(free_shm_bytes: int) -> dict[str, Any]:
    """Ray's object store settings for the shared memory that there is.

    Containers often have a /dev/shm of 64 MB. A store larger than that would end in a SIGBUS, so
    it goes to a folder on disk, which is slower and safe.

    Args:
        free_shm_bytes: free bytes of /dev/shm.
    """
    store_bytes = min(_STORE_BYTES, free_shm_bytes // 2)
    if store_bytes >= _SMALLEST_STORE_BYTES:
        return {"object_store_memory": store_bytes}
    logging.getLogger(__name__).warning(
        "/dev/shm has only %d MB free: Ray's object store goes to %s, which is slower. Give the "
        "container more shared memory (docker run --shm-size=2g).",
        free_shm_bytes >> 20,
        tempfile.gettempdir(),
    )
    return {"object_store_memory": _STORE_BYTES, "_plasma_directory": tempfile.gettempdir()}


@contextmanager
def _kept_sigterm_handler() -> Generator[None]:
    """Give SIGTERM back to who had it: `ray.init` (seen in 2.60) takes it for itself."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, previous)


@contextmanager
def _set_for_children(variables: Mapping[str, str]) -> Generator[None]:
    """Set variables for the processes that are started within."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


def start_cluster(config: Config) -> None:
    """Start a Ray of one node for this process, whose workers get `runtime_env`.

    Raises:
        ConfigError: Ray's token authentication is switched off, or the user's token is unreadable.
    """
    prepare_token()
    import ray

    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    with _kept_sigterm_handler(), _set_for_children(build_allocator_environment()):
        ray.init(
            address="local",  # or Ray would join any cluster that runs on this machine
            include_dashboard=False,
            configure_logging=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env=_worker_environment(config.runtime_env),
            **choose_object_store(free),
        )


def join_cluster(config: Config) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names; its workers for us get `runtime_env`.

    Ray takes folders for the workers at the connection only, so whoever connects first, be it to
    count devices, does it with the whole environment.

    Raises:
        PlacementError: no cluster answers there, or it refuses the token.
        ConfigError: Ray cannot make such a `runtime_env`, or this process is connected already
            without it.
    """
    import ray.exceptions

    if ray.is_initialized():
        _check_environment(config.runtime_env, ray.get_runtime_context().runtime_env)
        return
    timeout_s = config.runtime.startup_timeout_s
    address = os.environ["RAY_ADDRESS"]
    _knock(address, timeout_s)
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", str(int(timeout_s)))
    try:
        with _kept_sigterm_handler():
            ray.init(
                address=address,
                configure_logging=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=_worker_environment(config.runtime_env),
            )
    except ValueError as error:
        raise ConfigError(f"runtime_env: {error}") from error
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise PlacementError(
            f"no Ray cluster can be joined at RAY_ADDRESS={address}: {error}. Is it up, and is "
            "its token in RAY_AUTH_TOKEN_PATH?"
        ) from error
    _await_nodes(int(os.environ.get("CHATLEARN_NUM_NODES") or 1), timeout_s)


def find_worker_secrets(given: RuntimeEnvConfig) -> dict[str, str]:
    """The environment variables of the workers that Ray must not see."""
    return {key: value for key, value in given.env_vars.items() if is_secret_variable(key)}


def _worker_environment(given: RuntimeEnvConfig) -> dict[str, Any] | None:
    """Ray's `runtime_env`, in the containers that Ray insists on.

    Ray writes it into its logs (seen in 2.60), so secrets go with the workers' settings instead.
    """
    found = given.model_dump(exclude_defaults=True)
    found["env_vars"] = {k: v for k, v in given.env_vars.items() if not is_secret_variable(k)}
    if not found["env_vars"]:
        del found["env_vars"]
    return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items()} or None


def _check_environment(given: RuntimeEnvConfig, connected: Mapping[str, Any]) -> None:
    """Refuse a `runtime_env` that the connection which is there lacks.

    Args:
        given: what the config asks for.
        connected: the connection's; Ray has put addresses in the place of folders.
    """
    variables: Mapping[str, str] = connected.get("env_vars") or {}
    asked = _worker_environment(given) or {}
    wanted: Mapping[str, str] = asked.get("env_vars", {})
    lacking = [f"env_vars.{key}" for key, v in wanted.items() if variables.get(key) != v]
    lacking += [key for key in asked.keys() - {"env_vars", "excludes"} if not connected.get(key)]
    if lacking:
        raise ConfigError(
            f"runtime_env: this process is connected to Ray already, without {', '.join(lacking)}: "
            "leave the connection to chatlearn (call ray.shutdown() first), or give ray.init() "
            "the same runtime_env"
        )


def _knock(address: str, timeout_s: float) -> None:
    """See whether anybody listens there: Ray itself waits for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        return
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=_POLL_S + 1).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise PlacementError(
                    f"no Ray cluster answers at RAY_ADDRESS={address} within {timeout_s:g} s: "
                    f"{error}"
                ) from error
            time.sleep(_POLL_S)
        else:
            return


def _await_nodes(num_nodes: int, timeout_s: float) -> None:
    """Wait for the nodes that a launcher said it brings (`CHATLEARN_NUM_NODES`)."""
    import ray

    deadline = time.monotonic() + timeout_s
    while (found := sum(1 for node in ray.nodes() if node["Alive"])) < num_nodes:
        if time.monotonic() > deadline:
            raise PlacementError(
                f"{found} of {num_nodes} nodes joined Ray within {timeout_s:g} s: does the "
                "launcher run on every node?"
            )
        time.sleep(_POLL_S)


def count_cluster_devices() -> tuple[int, int]:
    """Nodes of the joined cluster and GPUs of the smallest of them that has any."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    gpus = [int(node["Resources"].get("GPU", 0)) for node in nodes]
    with_gpu = [count for count in gpus if count]
    if with_gpu:
        return len(with_gpu), min(with_gpu)
    return len(nodes), 0


def object_store_bytes() -> dict[str, int]:
    """Size of the object store of each node, by node id; its pages are taken as it fills."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return {
        str(node["NodeID"]): int(node["Resources"].get("object_store_memory", 0)) for node in nodes
    }


def leave_cluster() -> None:
    """Disconnect; a cluster that this process started ends with it."""
    import ray

    if ray.is_initialized():
        ray.shutdown()
