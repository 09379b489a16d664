"""Timings are told from what a deterministic run repeats."""

import pytest

from chatlearn.metrics.timings import is_timing, without_timings


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("time/episode", True),
        ("sync/policy/seconds", True),
        ("sync/policy/seconds_at_start", True),
        ("sync/policy/bytes", False),
        ("engine_overhead", True),
        ("rollout/tokens_per_s", True),
        ("train/policy/loss", False),
        ("eval/seconds", False),
    ],
)
def test_names(name, expected):
    assert is_timing(name) is expected


def test_the_rest_stays():
    assert without_timings({"step": 1.0, "time/rollout": 2.0}) == {"step": 1.0}
