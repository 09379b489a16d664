"""Checkpoint folders are there as a whole or not at all."""

import pytest

from chatlearn.checkpoint.folders import (
    RunState,
    begin_checkpoint,
    find_checkpoints,
    prune_checkpoints,
    read_run_state,
)
from chatlearn.errors import CheckpointError

STATE = RunState(episode=3, train_iteration=12, num_drawn=24, positions=(20, 4), seed=7)


def save(folder, episode):
    return begin_checkpoint(folder, episode).commit(STATE)


def test_a_checkpoint_is_seen_once_it_is_committed(tmp_path):
    draft = begin_checkpoint(tmp_path, 3)
    draft.model_folder("policy").mkdir()
    (draft.model_folder("policy") / "model.pt").write_text("weights")
    assert find_checkpoints(tmp_path) == []
    final = draft.commit(STATE)
    assert find_checkpoints(tmp_path) == [final]
    assert final.name == "episode_000003"
    assert (final / "models" / "policy" / "model.pt").read_text() == "weights"
    assert read_run_state(final) == STATE


def test_a_draft_that_was_left_behind_is_begun_anew(tmp_path):
    left = begin_checkpoint(tmp_path, 3)
    (left.folder / "models" / "half").write_text("")
    final = begin_checkpoint(tmp_path, 3).commit(STATE)
    assert list((final / "models").iterdir()) == []


def test_a_checkpoint_of_the_same_episode_is_replaced(tmp_path):
    old = save(tmp_path, 3)
    (old / "old").write_text("")
    new = save(tmp_path, 3)
    assert new == old
    assert not (new / "old").exists()


def test_checkpoints_are_listed_oldest_first_and_nothing_else_is(tmp_path):
    for episode in (1_000_000, 2, 10):
        save(tmp_path, episode)
    (tmp_path / "episode_x").mkdir()
    begin_checkpoint(tmp_path, 11)
    names = [path.name for path in find_checkpoints(tmp_path)]
    assert names == ["episode_000002", "episode_000010", "episode_1000000"]


@pytest.mark.parametrize(
    ("keep", "left"), [(None, [1, 2, 3]), (2, [2, 3]), (1, [3]), (5, [1, 2, 3])]
)
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    for episode in (1, 2, 3):
        save(tmp_path, episode)
    removed = prune_checkpoints(tmp_path, keep)
    assert [int(p.name[-1]) for p in find_checkpoints(tmp_path)] == left
    assert [int(p.name[-1]) for p in removed] == [e for e in (1, 2, 3) if e not in left]


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '{"positions": [1]}', '{"positions": [], "extra": 1}']
)
def test_a_state_that_is_missing_or_damaged_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "run_state.json").write_text(content)
    with pytest.raises(CheckpointError, match="run_state.json cannot be read"):
        read_run_state(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made: Not a directory"):
        begin_checkpoint(tmp_path / "file", 1)
