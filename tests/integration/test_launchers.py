"""The launch scripts, with two Ray nodes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest
from interrupts import heed_interrupts

pytestmark = pytest.mark.alone

SCRIPTS = Path(__file__).parents[2] / "scripts"
LIMIT_S = 100

ENGINE = """
import os, subprocess, sys, time
import chatlearn

CLIENT = '''
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10)
except Exception as error:
    print(type(error).__name__)
'''

def see_that_strangers_are_refused():
    import ray

    address = ray.get_runtime_context().gcs_address
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    for extra in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}):
        said = subprocess.check_output(
            [sys.executable, "-c", CLIENT, address], env=kept | extra, text=True
        )
        assert said.strip() == "AuthenticationError", said

def see_where_this_process_listens(host):
    import psutil

    found = psutil.Process().net_connections("tcp")
    at = [connection.laddr.ip for connection in found if connection.status == "LISTEN"]
    # Ray's own server is open; the store and the group of this rank are at the node's address.
    assert sorted(at) == sorted(["::", host, host]) and host != "::", at

class Where(chatlearn.BaseModule):
    def forward_step(self, data):
        if self.args.get("is_watched"):
            see_that_strangers_are_refused()
            see_where_this_process_listens(self.context.host)
        assert "RANK" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
        if self.args.get("fails"):
            raise ValueError("this worker fails on purpose")
        if self.args.get("seconds"):
            open("worker_is_busy", "w").close()
            time.sleep(self.args["seconds"])
        return {"node": [self.context.node_id] * len(data["prompt"])}

class TwoNodes(chatlearn.Engine):
    def learn(self):
        result = super().learn()
        print("rows came from", len({row["node"] for row in result.rollouts}), "nodes")
        return result

def build(config):
    where = Where("where", config.model("where").args)
    def flow(batch):
        return where.forward_step(batch)
    return TwoNodes(chatlearn.Environment(flow)).set_dataset(["a", "b", "c", "d"])
"""

CONFIG = """
models:
  where: {num_gpu: 2}
runtime:
  engine: two_nodes:build
  devices_per_node: 1
  startup_timeout_s: 60
  enable_tensorboard: false
"""


@dataclass
class Workplace:
    """A folder with an engine and a config, and the environment of two nodes."""

    folder: Path
    environment: dict[str, str]

    def start(self, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a script; its output goes to one pipe."""
        return subprocess.Popen(
            [str(SCRIPTS / script), *arguments],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=heed_interrupts,
        )

    def run_nodes(self, script: str, *arguments: str) -> tuple[list[int], list[str]]:
        """Run a script as both nodes; gives exit codes and outputs."""
        nodes = [self.start(script, *arguments, NODE_RANK=str(rank)) for rank in range(2)]
        outputs = [node.communicate(timeout=LIMIT_S)[0] for node in nodes]
        return [node.returncode for node in nodes], outputs

    def leftovers(self, wait_s: float = 10.0) -> list[str]:
        """Command lines of processes that came from here and live on after a moment."""
        mark = f"LAUNCH_MARK={self.environment['LAUNCH_MARK']}".encode()
        deadline = time.monotonic() + wait_s
        while (found := _processes_with(mark)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    """A folder and an environment with a token, free ports and a mark on every process."""
    (tmp_path / "two_nodes.py").write_text(ENGINE)
    (tmp_path / "run.yaml").write_text(CONFIG)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CHATLEARN_"))}
    return Workplace(
        tmp_path,
        kept
        | {
            "PYTHON": sys.executable,
            "PYTHONPATH": str(tmp_path),
            "LAUNCH_MARK": uuid.uuid4().hex,
            "RAY_AUTH_TOKEN": "5e" * 32,
            "NUM_NODES": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_ports(3)),
            "CHATLEARN_STARTUP_TIMEOUT_S": "60",
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [pytest.param("run_ray_cluster.sh", marks=pytest.mark.long), "run_torchrun.sh"]
)
def test_workers_run_on_both_nodes_and_all_leave_with_the_driver(
    workplace: Workplace, script: str
) -> None:
    codes, outputs = workplace.run_nodes(script, "run.yaml", "models.where.args.is_watched=true")
    assert codes == [0, 0], outputs
    assert "rows came from 2 nodes" in outputs[0]
    assert workplace.leftovers() == []


@pytest.mark.slow
def test_run_local_joins_a_cluster_of_two_nodes_that_is_there(workplace: Workplace) -> None:
    script = str(SCRIPTS / "run_local.sh")
    program = f"import subprocess, sys\nsys.exit(subprocess.call([{script!r}, 'run.yaml']))\n"
    (workplace.folder / "driver.py").write_text(program)
    codes, outputs = workplace.run_nodes("run_ray_cluster.sh", "driver.py")
    assert codes == [0, 0], outputs
    assert "rows came from 2 nodes" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["run_torchrun.sh", pytest.param("run_ray_cluster.sh", marks=pytest.mark.long)]
)
def test_every_node_fails_when_the_driver_fails(workplace: Workplace, script: str) -> None:
    codes, outputs = workplace.run_nodes(script, "run.yaml", "models.where.args.fails=true")
    assert codes == [1, 1], outputs
    assert "this worker fails on purpose" in outputs[0]
    assert workplace.leftovers() == []


def test_torchrun_keeps_the_exit_code_of_a_bad_config(workplace: Workplace) -> None:
    process = workplace.start(
        "run_torchrun.sh", "run.yaml", "runtime.num_episodes=2", NUM_NODES="1"
    )
    output = process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 2, output
    assert "did you mean 'num_episode'?" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "number", "codes"),
    [
        ("run_ray_cluster.sh", signal.SIGINT, [130, 130]),
        pytest.param("run_ray_cluster.sh", signal.SIGKILL, [-9, 1], marks=pytest.mark.long),
        pytest.param("run_torchrun.sh", signal.SIGINT, [130, 130], marks=pytest.mark.long),
        pytest.param("run_torchrun.sh", signal.SIGTERM, [143, 143], marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_first_node_ends_all(
    workplace: Workplace, script: str, number: signal.Signals, codes: list[int]
) -> None:
    arguments = (script, "run.yaml", "models.where.args.seconds=60")
    nodes = [workplace.start(*arguments, NODE_RANK=str(rank)) for rank in range(2)]
    deadline = time.monotonic() + LIMIT_S
    while not (workplace.folder / "worker_is_busy").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    nodes[0].send_signal(number)
    outputs = [node.communicate(timeout=LIMIT_S)[0] for node in nodes]
    assert [node.returncode for node in nodes] == codes, outputs
    assert number == signal.SIGKILL or not any("Traceback" in output for output in outputs)
    assert workplace.leftovers(30.0) == []


def test_a_wrong_token_is_refused_and_sigterm_ends_the_first_node(workplace: Workplace) -> None:
    first = workplace.start("run_ray_cluster.sh", "run.yaml", NODE_RANK="0")
    second = workplace.start(
        "run_ray_cluster.sh", "run.yaml", NODE_RANK="1", RAY_AUTH_TOKEN="wrong"
    )
    refusal = second.communicate(timeout=LIMIT_S)[0]
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=LIMIT_S)
    assert (first.returncode, second.returncode) == (143, 1)
    assert "node 1 is refused" in refusal
    assert "its token differs" in refusal
    assert workplace.leftovers() == []


@pytest.mark.parametrize("offset", [0, 1])
def test_a_port_in_use_is_named(workplace: Workplace, offset: int) -> None:
    port = int(workplace.environment["MASTER_PORT"]) + offset
    with socket.create_server(("", port)):
        first = workplace.start("run_ray_cluster.sh", "run.yaml", NODE_RANK="0")
        output = first.communicate(timeout=LIMIT_S)[0]
    assert first.returncode == 1
    assert f"port {port} of this machine is in use" in output
    assert "MASTER_PORT" in output


def test_a_node_whose_driver_never_comes_gives_up(workplace: Workplace) -> None:
    second = workplace.start(
        "run_ray_cluster.sh", "run.yaml", NODE_RANK="1", CHATLEARN_STARTUP_TIMEOUT_S="1"
    )
    output = second.communicate(timeout=LIMIT_S)[0]
    assert second.returncode == 1
    assert "node 1 cannot reach the driver's launcher" in output
    assert "within 1 s" in output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NODE_RANK": "2"}, "expected 0 to NUM_NODES-1"),
        ({"NODE_RANK": "0", "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"NODE_RANK": "one"}, "NODE_RANK=one: expected a whole number"),
        ({"NODE_RANK": "0", "RAY_ADDRESS": "elsewhere:6379"}, "builds a cluster of its own"),
        ({"NODE_RANK": "0", "RAY_AUTH_MODE": "disabled"}, "unset RAY_AUTH_MODE"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused(
    workplace: Workplace, environment: dict[str, str], message: str
) -> None:
    first = workplace.start("run_ray_cluster.sh", "run.yaml", **environment)
    output = first.communicate(timeout=LIMIT_S)[0]
    assert first.returncode == 2
    assert message in output


@pytest.mark.parametrize("script", ["run_local.sh", "run_ray_cluster.sh", "run_torchrun.sh"])
def test_a_script_without_arguments_shows_its_usage(workplace: Workplace, script: str) -> None:
    process = workplace.start(script)
    assert f"usage: {script} CONFIG.yaml" in process.communicate(timeout=LIMIT_S)[0]
    assert process.returncode == 2


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    for first in range(20000 + os.getpid() % 5000, 60000, count):
        with socket.socket() as probe:
            if all(probe.connect_ex(("127.0.0.1", first + n)) != 0 for n in range(count)):
                return first
    raise RuntimeError("no free ports")


def _processes_with(mark: bytes) -> list[str]:
    found: list[str] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
        except OSError:
            continue
    return found
