"""The fuzzer notices what it looks for, and finds nothing."""

import os
import random
import time
from dataclasses import dataclass

import pytest

from chatlearn.errors import ConfigError
from scripts.fuzz import KINDS, main, run_fuzz, share_cases
from scripts.fuzzing.judging import run_cases


@dataclass
class Case:
    name: str
    marker: object
    description: str = ""

    @property
    def must_refuse(self):
        return self.name == "accepted, and must not be"

    def load(self):
        if self.name == "refused":
            raise ConfigError("no")
        if self.name == "no line":
            raise ConfigError("Traceback (most recent call last)")
        if self.name == "another error":
            raise KeyError("what")
        if self.name == "hangs":
            time.sleep(100)
        if self.name == "dies":
            os._exit(3)
        if self.name == "runs code":
            self.marker.mkdir()


NAMES = ["accepted", "refused", "no line", "another error", "hangs", "dies", "runs code"]
NAMES += ["accepted, and must not be", "refused"]


# What each number draws first, so that a maker finds its case again in a new process.
BY_LOT = {random.Random(f"0/x/{n}").random(): name for n, name in enumerate(NAMES)}


class Maker:
    def __init__(self, folder):
        self.marker = folder / "owned"

    def make(self, lots):
        return Case(BY_LOT[lots.random()], self.marker)


def test_every_way_to_fail_is_counted():
    found = list(run_cases("x", Maker, range(len(NAMES)), 0, 2.0))
    expected = ["accepted", "refused", *["failed"] * 6, "refused"]
    assert [outcome.verdict for outcome in found] == expected
    assert [outcome.number for outcome in found] == list(range(len(NAMES)))
    assert "does not end within 2 s" in found[4].text
    assert "died: 3" in found[5].text
    assert "code from the file was run" in found[6].text


@pytest.mark.parametrize("count", [7, 100, 2001])
def test_cases_are_shared_among_the_kinds(count):
    shares = share_cases(count, list(KINDS))
    assert sum(shares.values()) == count
    assert min(shares.values()) >= 1


@pytest.mark.parametrize("kind", ["config_text", "megatron"])
def test_no_case_of_a_few_fails(kind):
    found = run_fuzz({kind: range(20)}, 5, 60.0, lambda _: None)
    assert found["failures"] == []
    assert found["refused"] > 10
    assert found["cases"] == 20


@pytest.mark.long
def test_no_case_of_thousands_fails(capsys):
    assert main(["--cases", "2400", "--seed", "17", "--json"]) == 0
