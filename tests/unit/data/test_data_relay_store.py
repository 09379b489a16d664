"""What a relay store would give a run that goes on: what its next episode can still see."""

from __future__ import annotations

import pytest

from chatlearn.data.relay import EpisodeRelayBuffer, RelayStore


@pytest.mark.parametrize(
    ("limit", "offset", "expected"),
    [(0, 0, []), (1, 0, []), (2, 0, [3]), (3, 0, [2, 3]), (-1, 0, [0, 1, 2, 3]), (-1, 2, [2, 3])],
)
def test_only_episodes_that_can_still_be_seen_are_saved(limit, offset, expected):
    store = RelayStore(limit, offset)
    for episode in range(4):
        store.add(EpisodeRelayBuffer(episode, [{"x": episode}]))
    saved = store.episodes
    assert [each.episode_id for each in saved] == expected
    other = RelayStore(limit, offset)
    other.restore(saved)
    following = EpisodeRelayBuffer(4, [])
    ids = [[e.episode_id for e in each.add(following)] for each in (store, other)]
    assert ids[0] == ids[1]


def test_rows_that_are_added_to_later_are_saved_as_they_were():
    store = RelayStore(2)
    store.add(EpisodeRelayBuffer(0, [{"x": 1}]))
    (saved,) = store.episodes
    store.add(EpisodeRelayBuffer(1, []))[0].buffer[0]["y"] = 2
    assert saved.buffer == [{"x": 1}]
