"""The kinds of errors and what a worker's failure says."""

import pickle

import pytest

from chatlearn import errors
from chatlearn.errors import (
    ChatLearnError,
    ConfigError,
    PlacementError,
    WorkerError,
    in_one_line,
)


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name != "in_one_line"])
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
