"""How often a run may recover, and what it says when that is used up."""

from chatlearn.engine.recovery import RecoveryBudget
from chatlearn.errors import DataError, WaitTimeoutError


def fail():
    return WaitTimeoutError("nobody answers")


def test_the_last_failure_says_that_the_recoveries_are_used_up(tmp_path):
    told = []
    budget = RecoveryBudget(1, tmp_path / "recoveries.jsonl", told.append)
    assert budget.take(fail())
    assert told == []
    assert not budget.take(fail())
    assert not budget.take(fail())
    assert told == [
        "1 of 1 recoveries (runtime.max_restarts) are used up: this failure ends the run"
    ]


def test_what_is_never_tried_again_uses_nothing_up(tmp_path):
    told = []
    budget = RecoveryBudget(1, tmp_path / "recoveries.jsonl", told.append)
    assert not budget.take(DataError("rows"))
    assert budget.take(fail())
    budget.give_back()
    assert budget.take(fail())
    assert told == []
