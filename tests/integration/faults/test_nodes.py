"""A node that is cut off: its workers are declared dead together, without waiting for Ray."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.faults.nodes import TwoNodes, can_cut

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(not can_cut(), reason="network namespaces cannot be made here"),
]

ROOT = Path(__file__).parents[3]
BEGIN_S = 90
# Until then Ray itself has not given up a node that is cut off.
SOON_S = 60

PROGRAM = """
import time
from pathlib import Path
import chatlearn

class Waiting(chatlearn.BaseModule):
    def train_step(self, data):
        Path("FOLDER", f"{self.name}.{self.rank}").touch()
        time.sleep(300)

chatlearn.init({
    "models": {name: {"num_gpu": 2} for name in ("a", "b")},
    "runtime": {
        "output_dir": "FOLDER", "enable_tensorboard": False, "devices_per_node": 1,
        "colocation": [["a", "b"]], "heartbeat_timeout_s": 4, "stage_timeout_s": 600,
    },
})
a, b = Waiting("a"), Waiting("b")

def flow(batch):
    a.train_step(batch)
    b.train_step(batch)

chatlearn.Engine(None, chatlearn.Trainer(flow)).set_dataset([1, 2]).learn()
"""


def test_workers_of_a_node_that_is_cut_off_are_dead_together_and_soon(tmp_path):
    nodes = TwoNodes(tmp_path / "cluster", is_apart=True)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    environment = os.environ | nodes.environment | {"PYTHONPATH": str(ROOT)}
    driver = None
    try:
        with (tmp_path / "driver.log").open("wb") as log:
            driver = subprocess.Popen(
                [sys.executable, str(program)], env=environment, stdout=log, stderr=log
            )
        wait_for(lambda: len(list(tmp_path.glob("a.[01]"))) == 2, driver, tmp_path)
        nodes.cut()
        assert driver.wait(SOON_S) != 0
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
            driver.wait(10)
        nodes.close()
    said = (tmp_path / "driver.log").read_text()
    assert said.count("has not answered for") == 2, said
    assert said.count("nobody answers; workers there count as dead") >= 1, said
    assert "WorkerError: the worker process died" in said, said


def wait_for(is_so, driver, folder):
    deadline = time.monotonic() + BEGIN_S
    while not is_so():
        assert driver.poll() is None, (folder / "driver.log").read_text()
        assert time.monotonic() < deadline, "the run did not begin in time"
        time.sleep(0.2)
