"""Which cases of a long list run every time."""

import pytest


def every(step, cases):
    """The cases, of which all but every `step`-th are left to the long form."""
    return [
        case if number % step == 0 else left_to_the_long_form(case)
        for number, case in enumerate(cases)
    ]


def only(short, cases):
    """The named cases, of which those not in `short` are left to the long form."""
    assert set(short) <= set(cases)
    return [case if case in short else left_to_the_long_form(case) for case in cases]


def left_to_the_long_form(case):
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.long)
