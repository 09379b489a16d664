"""Which errors count as a broken connection: what native code raised, not what a program says."""

from __future__ import annotations

import pytest
import torch

from chatlearn.runtime.ray_errors import is_broken_connection


def caught(function):
    with pytest.raises(Exception) as found:  # noqa: PT011 - any kind
        function()
    return found.value


def of_a_program():
    raise RuntimeError("NCCL is not what this node was set up for")


def of_native_code():
    # Its message holds what it was given.
    torch.device("gloo connection reset")


def test_native_code_that_names_a_connection_counts():
    error = caught(of_native_code)
    assert isinstance(error, RuntimeError)
    assert is_broken_connection(error)


@pytest.mark.parametrize(
    "function", [of_a_program, lambda: torch.device("nowhere"), lambda: [][0], lambda: int("gloo")]
)
def test_nothing_else_does(function):
    assert not is_broken_connection(caught(function))
