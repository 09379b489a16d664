"""The kinds of errors and what a worker's failure says."""

import errno
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from chatlearn import errors
from chatlearn.errors import (
    ChatLearnError,
    ConfigError,
    PlacementError,
    WorkerError,
    explain_unwritten,
    in_one_line,
)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_every_error_can_be_caught_as_one_kind(name):
    assert issubclass(getattr(errors, name), ChatLearnError)


def test_a_placement_that_cannot_work_is_a_bad_config():
    assert issubclass(PlacementError, ConfigError)


def build_error():
    return WorkerError(
        "ValueError: bad",
        model_name="policy",
        rank=3,
        replica=1,
        node="10.0.0.7",
        flow_line="flow.py:4: policy.forward_step(batch)",
        worker_traceback="Traceback ...\nValueError: bad\n\n",
    )


def test_a_workers_failure_says_who_where_and_why():
    assert str(build_error()).splitlines() == [
        "ValueError: bad (model 'policy', replica 1, rank 3, node 10.0.0.7)",
        "flow line: flow.py:4: policy.forward_step(batch)",
        "worker traceback:",
        "Traceback ...",
        "ValueError: bad",
    ]


def test_what_is_not_known_is_left_out():
    error = WorkerError("died", model_name="policy", rank=0, is_death=True)
    assert str(error) == "died (model 'policy', replica 0, rank 0)"
    assert (error.is_death, error.is_collateral) == (True, False)


def test_a_workers_failure_survives_pickling():
    error = build_error()
    error.is_collateral = True
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is WorkerError
    assert str(again) == str(error)
    assert vars(again) == vars(error)


def test_what_an_error_says_fits_into_a_line():
    assert in_one_line(ValueError("one\n\ttwo")) == "ValueError: one two"
    assert in_one_line(ConfigError("one\ntwo")) == "one two"
    assert len(in_one_line(ValueError("x" * 5000))) < 500


def os_error(number):
    return OSError(number, os.strerror(number), "/elsewhere/file")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            os_error(errno.ENOSPC),
            "No space left on device: make room there, or set runtime.output_dir to another disk",
        ),
        (
            os_error(errno.ENOENT),
            "No such file or directory: was its folder removed meanwhile?",
        ),
        (os_error(errno.EACCES), "Permission denied"),
        (OSError("the tape\nis torn"), "OSError: the tape is torn"),
        (RuntimeError("bad"), "RuntimeError: bad"),
    ],
)
def test_what_cannot_be_written_is_told_in_a_line_with_what_to_do(error, said):
    assert explain_unwritten(Path("/none/x"), error) == f"/none/x cannot be written: {said}"


@pytest.mark.parametrize("num_bytes", [0, 1 << 30])
def test_a_full_disk_is_named_where_a_library_does_not(monkeypatch, tmp_path, num_bytes):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=num_bytes))
    error = RuntimeError("basic_ios::clear: iostream error")
    said = explain_unwritten(tmp_path / "none/model.pt", error)
    assert ("written: its disk is full (RuntimeError: basic_ios" in said) == (num_bytes == 0)
    assert "its disk is full" not in explain_unwritten(tmp_path, os_error(errno.EACCES))
