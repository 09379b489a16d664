"""One Ray for the whole test session; tests that ask for it join it as they would any cluster."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

_START_S = 60.0


@dataclass(frozen=True)
class _Head:
    """Ray's head process, and the environment by which others join it."""

    process: subprocess.Popen
    environment: dict[str, str]

    def enter(self, patch):
        """Make this process and its children join the head from now on."""
        assert self.process.poll() is None, "the session's Ray has died"
        for name, value in self.environment.items():
            patch.setenv(name, value)
        from ray._raylet import Config

        Config.initialize("")


@pytest.fixture(scope="session")
def _ray_head():
    folder = Path(tempfile.mkdtemp(prefix="clr-"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    port, client_port = _free_ports(2)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    arguments = [
        *("--head", "--block", f"--port={port}", "--include-dashboard=false"),
        *("--disable-usage-stats", f"--num-gpus={_count_gpus()}", f"--temp-dir={folder}"),
        *(f"--ray-client-server-port={client_port}", "--object-store-memory=300000000"),
    ]
    log = (folder / "head.log").open("w")
    head = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", *arguments],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        _await_head(head, folder / "head.log")
        address = f"{socket.gethostbyname(socket.gethostname())}:{port}"
        yield _Head(
            head,
            {
                "RAY_ADDRESS": address,
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(token),
            },
        )
    finally:
        head.terminate()
        try:
            head.wait(timeout=20)
        except subprocess.TimeoutExpired:
            head.kill()
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _count_gpus():
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _free_ports(count):
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _await_head(head, log):
    deadline = time.monotonic() + _START_S
    while "Ray runtime started" not in log.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"Ray's head did not start:\n{log.read_text()}")
        time.sleep(0.2)


@pytest.fixture
def ray_cluster(_ray_head, monkeypatch):
    """The environment by which this process and its children join the session's Ray."""
    _ray_head.enter(monkeypatch)
    import ray

    yield _ray_head.environment
    ray.shutdown()
