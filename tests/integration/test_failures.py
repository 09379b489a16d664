"""What a person sees when a run fails or is ended, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from interrupts import heed_interrupts

pytestmark = pytest.mark.alone

HERE = Path(__file__).parent
START_S = 90.0
REACT_S = 10.0


class Program:
    """A `chatlearn train` in a process group of its own, with a Ray of its own."""

    def __init__(self, folder, engine, extra=""):
        self.folder = folder
        config = folder / "config.yaml"
        config.write_text(
            f"models: {{trainer: {{num_gpu: 2}}}}\n"
            f"runtime: {{engine: 'failing_programs:{engine}', output_dir: '{folder}/runs', "
            f"train_global_batch_size: 8, num_episode: 1000, enable_tensorboard: false{extra}}}\n"
        )
        own = {"CHATLEARN_TEST_FOLDER": str(folder), "PYTHONPATH": str(HERE)}
        chosen = ("RAY_", "CHATLEARN_")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(chosen)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "chatlearn.cli.main", "train", str(config)],
            env={**inherited, **own, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )

    def await_moment(self):
        """The time at which a worker noted what the test waits for."""
        deadline = time.monotonic() + START_S
        while not (self.folder / "moment").exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the moment never came:\n{self.process.communicate()[0]}")
            time.sleep(0.05)
        return float((self.folder / "moment").read_text().split()[-1])

    def finish(self, timeout_s):
        """Exit code and output."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def processes(self):
        """Everything that this program started and that still lives."""
        mark = str(self.folder)
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CHATLEARN_TEST_FOLDER") == mark:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def await_silence(self):
        """What is left after a moment's grace, by name."""
        _, alive = psutil.wait_procs(self.processes(), 5)
        return [process.name() for process in alive]


@pytest.fixture
def start(tmp_path):
    programs = []

    def run(engine, extra=""):
        programs.append(Program(tmp_path, engine, extra))
        return programs[-1]

    yield run
    for program in programs:
        for process in program.processes():
            process.kill()


def test_a_worker_that_raises_ends_the_run_with_its_story(start):
    program = start("build_raising")
    moment = program.await_moment()
    code, output = program.finish(REACT_S)
    assert time.time() - moment < REACT_S
    assert code == 1
    assert "ValueError: the second batch is bad (model 'trainer', replica 0, rank 1" in output
    assert "failing_programs.py" in output
    assert "trainer.train_step(batch)" in output
    assert 'raise ValueError("the second batch is bad")' in output
    assert program.await_silence() == []


def test_a_worker_that_is_killed_ends_the_run_with_its_name(start):
    program = start("build_dying")
    moment = program.await_moment()
    code, output = program.finish(REACT_S)
    assert time.time() - moment < REACT_S
    assert code == 1
    assert "the worker process died" in output
    assert "model 'trainer', replica 0, rank 1" in output
    assert "trainer.train_step(batch)" in output
    assert program.await_silence() == []


def test_ctrl_c_ends_the_run_with_130(start):
    program = start("build_idle")
    program.await_moment()
    os.killpg(program.process.pid, signal.SIGINT)
    code, output = program.finish(2 * REACT_S)
    assert code == 130
    assert output.rstrip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in output
    assert program.await_silence() == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_workers_start_leaves_nothing(start, number):
    program = start("build_slow_starter")
    program.await_moment()
    program.process.send_signal(number)
    code, output = program.finish(2 * REACT_S)
    assert code == 128 + number, output
    assert "Traceback" not in output
    assert program.await_silence() == []


def test_sigterm_saves_a_checkpoint_and_exits_with_143(start):
    program = start("build_busy")
    program.await_moment()
    program.process.terminate()
    code, output = program.finish(2 * REACT_S)
    assert code == 143, output
    (checkpoint,) = program.folder.glob("runs/chatlearn/*/checkpoints/episode_*")
    assert f"terminated by SIGTERM; saved {checkpoint}" in output
    assert (checkpoint / "run_state.json").exists()
    assert (checkpoint / "models" / "trainer" / "model.pt").exists()
    assert program.await_silence() == []
