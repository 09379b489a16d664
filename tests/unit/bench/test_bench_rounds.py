"""Processes that are measured in turns: what they are told, what they report, how they end."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

import pytest

from scripts.bench.peers import peer_python
from scripts.bench.rounds import BenchError, SideSpec, alternate, start_sides
from scripts.bench.sides.gate import Gate, StepGate

SIDE = """
import sys
import time
from scripts.bench.sides.gate import Gate, parse_side_arguments, serve_work

given = parse_side_arguments()
if given.options.get("fails"):
    sys.exit("no such luck")


def work(order):
    time.sleep(order.get("sleep_s", 0))
    if "die" in order:
        sys.exit("dead now")
    return {"twice": 2 * order["number"]}


serve_work(Gate(given.address), work, {"num_parameters": 7})
"""


@pytest.fixture
def python(tmp_path):
    """An interpreter that runs SIDE, whatever module it is asked for."""
    program, shell = tmp_path / "side.py", tmp_path / "python"
    program.write_text(SIDE)
    shell.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{program}" "$@"\n')
    shell.chmod(0o755)
    return str(shell)


def test_sides_work_in_turns_and_end_with_the_block(python):
    specs = [SideSpec(name, "any", {}, python) for name in "ab"]
    with start_sides(specs) as sides:
        assert [side.hello for side in sides] == [{"num_parameters": 7}] * 2
        found = alternate(sides, {"number": 3}, num_rounds=2, warmup={"number": 0})
        processes = [side._process for side in sides]
    assert [[r["amounts"] for r in found[name]] for name in "ab"] == [[{"twice": 6}] * 2] * 2
    assert [process.returncode for process in processes] == [0, 0]


def test_a_side_that_does_not_start_says_why(python):
    with (
        pytest.raises(BenchError, match=r"a ended before it was ready(?s:.*)no such luck"),
        start_sides([SideSpec("a", "any", {"fails": True}, python)]),
    ):
        pass


def test_a_side_that_dies_says_why(python):
    with (
        start_sides([SideSpec("a", "any", {}, python)]) as sides,
        pytest.raises(BenchError, match=r"a died(?s:.*)dead now"),
    ):
        sides[0].run({"die": True})


def test_an_environment_of_the_peers_that_cannot_be_built_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("VENV_BENCH", str(tmp_path / "missing"))
    monkeypatch.setenv("PYTHON", str(tmp_path / "no-python"))
    with pytest.raises(BenchError, match="make bench-setup"):
        peer_python()


def test_a_step_gate_times_the_steps_between_two_orders(tmp_path):
    address = str(tmp_path / "gate")
    reports = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(1)

        def drive():
            connection, _ = server.accept()
            with connection, connection.makefile("r") as lines:
                for order in (b'{"steps": 2}\n', b'{"stop": true}\n'):
                    reports.append(lines.readline())
                    connection.sendall(order)
                reports.append(lines.read())

        driver = threading.Thread(target=drive, daemon=True)
        driver.start()
        gate = Gate(address)
        steps = StepGate(gate)
        steps.greet_with(dtype="float32")
        passed = 0
        while steps.before_step():
            steps.count(samples=5)
            time.sleep(0.02)
            passed += 1
        gate.close()
        driver.join(10)
    assert passed == 2
    assert reports[0] == '{"dtype": "float32"}\n'
    assert '"amounts": {"samples": 10.0}' in reports[1]
    assert reports[2] == ""


def test_a_driver_that_is_gone_ends_the_process(tmp_path):
    address = str(tmp_path / "gate")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen(1)
        gate = Gate(address)
        server.accept()[0].close()
    with pytest.raises(SystemExit, match="the benchmark is gone"):
        gate.ask({"seconds": 1.0})


def test_a_side_in_the_middle_of_a_round_is_ended(python):
    started = []

    def interrupt_a_round():
        with start_sides([SideSpec("a", "any", {}, python)]) as sides:
            started.append(sides[0]._process)
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            sides[0].run({"number": 1, "sleep_s": 60})

    with pytest.raises(KeyboardInterrupt):
        interrupt_a_round()
    assert started[0].returncode == -signal.SIGTERM
