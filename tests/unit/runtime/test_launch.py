import queue
import signal
import subprocess

import pytest

from chatlearn.runtime import launch
from chatlearn.runtime.launch import (
    DriverWatch,
    LaunchPlace,
    read_script_place,
    read_torchrun_place,
)
from chatlearn.runtime.meeting import NodeLeft


class FakeHead:
    def __init__(self, is_up=True):
        self.is_up = is_up

    def is_running(self):
        return self.is_up

    def failure(self):
        return "Ray ended with exit code 1:"


class FakeListener:
    def __init__(self, *left):
        self.left = queue.Queue()
        for each in left:
            self.left.put(each)


@pytest.fixture
def run_driver(monkeypatch):
    """`run_driver(shell command, head, listener, *signals)`: the exit code that the nodes hear."""
    monkeypatch.setattr(launch, "_GRACE_S", 0.0)

    def run(command, head, listener, *signals):
        received = queue.SimpleQueue()
        for number in signals:
            received.put(number)
        with subprocess.Popen(["sh", "-c", command]) as process:
            return DriverWatch(process, head, listener, received).wait()

    return run


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", 137)])
def test_the_nodes_hear_the_drivers_exit_code(run_driver, command, code):
    assert run_driver(command, FakeHead(), FakeListener()) == code


def test_a_signal_goes_on_to_the_driver(run_driver):
    assert run_driver("exec sleep 60", FakeHead(), FakeListener(), signal.SIGINT) == 130


def test_a_hangup_ends_the_driver_by_sigterm(run_driver):
    assert run_driver("exec sleep 60", FakeHead(), FakeListener(), signal.SIGHUP) == 143


def test_a_driver_whose_node_left_is_ended_and_has_failed(run_driver, capfd):
    listener = FakeListener(NodeLeft("node 1", "left early: Ray ended", was_in=True))
    assert run_driver("exec sleep 60", FakeHead(), listener) == 1
    assert "node 1: left early: Ray ended" in capfd.readouterr().err


def test_a_driver_whose_head_died_is_ended_and_has_failed(run_driver, capfd):
    assert run_driver("exec sleep 60", FakeHead(is_up=False), FakeListener()) == 1
    assert "Ray ended with exit code 1" in capfd.readouterr().err


def test_a_stranger_turned_away_does_not_end_the_driver(run_driver):
    listener = FakeListener(NodeLeft("10.0.0.9", "turned away: it hung up", was_in=False))
    assert run_driver("sleep 0.6", FakeHead(), listener) == 0


def test_the_script_takes_rank_and_world_size_where_node_rank_is_missing():
    environment = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "head", "MASTER_PORT": "7000"}
    assert read_script_place(environment) == LaunchPlace(1, 4, 0, 4, "head", 7000)


def test_torchrun_keeps_its_own_port():
    environment = {
        "GROUP_RANK": "1",
        "GROUP_WORLD_SIZE": "2",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "29500",
    }
    assert read_torchrun_place(environment) == LaunchPlace(1, 2, 3, 8, "head", 29501)
    assert read_torchrun_place(environment | {"CHATLEARN_PORT": "7000"}).port == 7000
