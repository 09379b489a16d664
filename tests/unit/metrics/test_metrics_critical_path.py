"""The longest chain of work."""

import pytest

from chatlearn.metrics.critical_path import BusySpan, critical_seconds


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 0.0),
        ([BusySpan(1.0, 3.0)], 2.0),
        # Side by side: the longer one; what it did not wait for adds nothing.
        ([BusySpan(0.0, 2.0, (), ("a",)), BusySpan(0.0, 3.0, (), ("b",))], 3.0),
        ([BusySpan(0.0, 2.0, (), ("a",)), BusySpan(2.5, 3.5, ("b",))], 2.0),
        # One after another: both, without the gap between them.
        ([BusySpan(0.0, 2.0, (), ("a",)), BusySpan(2.5, 3.5, ("a",))], 3.0),
        # What is given twice is there once the longer chain is.
        (
            [
                BusySpan(0.0, 2.0, (), ("a",)),
                BusySpan(0.0, 1.0, (), ("a",)),
                BusySpan(3.0, 4.0, ("a",), ("b",)),
                BusySpan(4.0, 9.0, ("b",)),
            ],
            8.0,
        ),
    ],
)
def test_the_critical_path_is_the_longest_chain_of_what_needed_each_other(spans, expected):
    assert critical_seconds(spans) == expected
    assert critical_seconds(reversed(spans)) == expected
