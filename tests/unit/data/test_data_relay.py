"""Past episodes and what a sample manager gives back."""

from typing import Any

import pytest

from chatlearn.data.relay import EpisodeRelayBuffer, RelaySampleManager, RelayStore, identify_rows
from chatlearn.data.rows import RowId
from chatlearn.errors import DataError


def kept(max_episodes, offset=0, episodes=4):
    store = RelayStore(max_episodes, offset)
    return [[e.episode_id for e in store.add(EpisodeRelayBuffer(at, []))] for at in range(episodes)]


@pytest.mark.parametrize(
    ("max_episodes", "offset", "expected"),
    [
        (0, 0, [[0], [1], [2], [3]]),
        (1, 0, [[0], [1], [2], [3]]),
        (2, 0, [[0], [0, 1], [1, 2], [2, 3]]),
        (-1, 0, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]),
        (-1, 2, [[0], [1], [2], [2, 3]]),
    ],
)
def test_the_last_episodes_are_kept_oldest_first(max_episodes, offset, expected):
    assert kept(max_episodes, offset) == expected


def test_the_default_manager_trains_on_the_newest_episode():
    old, new = EpisodeRelayBuffer(0, [{"x": 1}]), EpisodeRelayBuffer(1, [{"x": 2}])
    assert RelaySampleManager()([old, new]) == [{"x": 2}]


def test_metrics_are_handed_over_once():
    manager = RelaySampleManager()
    manager.log_metrics({"kept": 1})
    assert (manager.take_metrics(), manager.take_metrics()) == ({"kept": 1.0}, {})


def test_rows_keep_their_id_and_lose_the_column():
    assert identify_rows([{"row_id": RowId(3, 1), "x": 1}, {"row_id": RowId(2, 0), "x": 2}]) == {
        RowId(3, 1): {"x": 1},
        RowId(2, 0): {"x": 2},
    }


def test_a_row_that_comes_again_or_is_new_gets_an_id_of_its_own():
    row = {"row_id": RowId(3, 1), "x": 1}
    found = identify_rows([row, row, {"x": 2}])
    assert list(found.values()) == [{"x": 1}, {"x": 1}, {"x": 2}]
    assert list(found) == [RowId(3, 1), RowId(-1, 0), RowId(-2, 0)]


def test_a_fresh_id_is_one_that_no_row_has():
    rows = [{"x": 1}, {"row_id": RowId(-1, 0), "x": 2}, {"row_id": RowId(-2, 0), "x": 3}]
    found = identify_rows(rows)
    assert [columns["x"] for columns in found.values()] == [1, 2, 3]
    assert found[RowId(-1, 0)] == {"x": 2}
    assert found[RowId(-2, 0)] == {"x": 3}


@pytest.mark.parametrize("row_id", [(1,), (1, 2, 3), ("a", 0), [1, 0], 7])
def test_what_is_no_id_is_refused(row_id):
    with pytest.raises(DataError, match=r"a row with row_id=.*; expected the row_id of a sample"):
        identify_rows([{"x": 0}, {"row_id": row_id, "x": 1}])


def test_a_plain_pair_is_an_id():
    assert identify_rows([{"row_id": (1, 0), "x": 1}]) == {RowId(1, 0): {"x": 1}}


def test_a_new_row_does_not_displace_one_before_it():
    found = identify_rows([{"row_id": RowId(-1, 0), "x": 1}, {"x": 2}])
    assert list(found.values()) == [{"x": 1}, {"x": 2}]


def test_no_rows_are_fine_and_what_is_no_list_of_rows_is_refused():
    assert identify_rows([]) == {}
    nothing: Any = None
    with pytest.raises(DataError, match="gave NoneType; expected a list of rows"):
        identify_rows(nothing)
    wrong: list = [{"x": 1}, 3]
    with pytest.raises(DataError, match="gave a row of type int; expected a dict"):
        identify_rows(wrong)
