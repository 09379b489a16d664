"""Checkpoint folders are there as a whole or not at all."""

import hashlib
import json
import os
from dataclasses import asdict, replace

import pytest

from chatlearn.checkpoint.folders import (
    begin_checkpoint,
    find_checkpoints,
    find_damage,
    find_newest,
    prune_checkpoints,
)
from chatlearn.checkpoint.manifest import sum_file, verify_checkpoint
from chatlearn.checkpoint.run_state import RunState, read_run_state
from chatlearn.errors import CheckpointError

STATE = RunState(
    episode=3,
    train_iteration=12,
    num_drawn=24,
    positions=(20, 4),
    seed=7,
    lengths=(30, 6),
    version=4,
    trained=("policy",),
)


def save(folder, episode, created_s=0.0):
    draft = begin_checkpoint(folder, episode)
    draft.model_folder("policy").mkdir()
    (draft.model_folder("policy") / "model.pt").write_bytes(bytes(range(200)))
    return draft.commit(replace(STATE, episode=episode, created_s=created_s))


def test_a_draft_made_anew_has_another_name_and_the_earlier_one_is_gone(tmp_path):
    earlier, other = begin_checkpoint(tmp_path, 3), begin_checkpoint(tmp_path, 4)
    again = begin_checkpoint(tmp_path, 3)
    assert again.folder != earlier.folder
    assert not earlier.folder.exists()
    assert other.folder.exists()
    with pytest.raises(FileNotFoundError):
        # What a writer that lives on would still do.
        (earlier.model_folder("policy") / "model.pt").write_text("of another time")


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
    "content",
    [
        *(None, "", "[]", "{}", "7", '{"format": 1}', '{"format": 2, "positions": [1]}'),
        json.dumps({"format": 4, **asdict(STATE), "extra": 1}),
        json.dumps({"format": 4, **asdict(STATE), "episode": "3"}),
        json.dumps({"format": 4, **asdict(STATE), "positions": [1, -2]}),
        "[" * 100_000,
    ],
)
def test_a_state_that_is_missing_or_damaged_names_the_file(tmp_path, content):
    if content is not None:
        (tmp_path / "run_state.json").write_text(content)
    with pytest.raises(CheckpointError, match="run_state.json cannot be read"):
        read_run_state(tmp_path)


def test_a_state_that_knows_versions_of_stale_models_only_is_read(tmp_path):
    state = replace(STATE, stale=("old",), synced=("old",), synced_versions=(2,))
    content = {"format": 3, **asdict(state), "stale_versions": [2]}
    del content["synced"], content["synced_versions"]
    (tmp_path / "run_state.json").write_text(json.dumps(content))
    assert read_run_state(tmp_path) == state
    assert read_run_state(tmp_path).versions == {"old": 2}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"synced_versions": [1, 2]}, "expected a version for each of 1 models"),
        ({"stale": ["other"]}, "expected a version for each stale model"),
    ],
)
def test_a_state_that_lacks_a_version_is_refused(tmp_path, changed, said):
    state = replace(STATE, synced=("old",), synced_versions=(2,))
    content = {"format": 4, **asdict(state), **changed}
    (tmp_path / "run_state.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=said):
        read_run_state(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be made: Not a directory"):
        begin_checkpoint(tmp_path / "file", 1)


def test_an_error_without_a_system_s_reason_says_its_own(tmp_path, monkeypatch):
    def refuse(folder, state):
        raise OSError("the tape is torn")

    monkeypatch.setattr("chatlearn.checkpoint.folders.write_run_state", refuse)
    with pytest.raises(CheckpointError, match="cannot be written: OSError: the tape is torn"):
        begin_checkpoint(tmp_path, 1).commit(STATE)


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "cut short", "changed"])
@pytest.mark.parametrize("name", ["models/policy/model.pt", "run_state.json", "manifest.json"])
def test_whatever_is_damaged_is_found_and_named(tmp_path, name, kind):
    checkpoint = save(tmp_path, 3)
    verify_checkpoint(checkpoint)
    damage(checkpoint / name, kind)
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(checkpoint)


def test_files_that_change_places_are_found(tmp_path):
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    paths = [each / "run_state.json" for each in (first, second)]
    texts = [path.read_text() for path in paths]
    for path, text in zip(paths, reversed(texts), strict=True):
        path.write_text(text)
    assert find_damage(first) is not None
    assert find_damage(second) is not None


def test_a_manifest_cannot_name_what_lies_outside(tmp_path):
    checkpoint = save(tmp_path, 3)
    content = json.loads((checkpoint / "manifest.json").read_text())
    content["files"]["../elsewhere"] = [0, ""]
    text = json.dumps(content["files"], sort_keys=True)
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        verify_checkpoint(checkpoint)


def test_a_link_is_no_part_of_a_checkpoint(tmp_path):
    draft = begin_checkpoint(tmp_path, 3)
    (draft.folder / "models" / "link").symlink_to("/etc/passwd")
    with pytest.raises(CheckpointError, match="no plain file"):
        draft.commit(STATE)
    assert find_checkpoints(tmp_path) == []


def test_what_a_worker_has_written_must_still_be_there(tmp_path):
    draft = begin_checkpoint(tmp_path, 3)
    path = draft.model_folder("policy") / "model.pt"
    path.parent.mkdir()
    path.write_bytes(b"12345")
    known = {"models/policy/model.pt": sum_file(path)}
    path.write_bytes(b"123")
    with pytest.raises(CheckpointError, match="model.pt has 3 bytes, its writer left 5"):
        draft.commit(STATE, known)
    path.unlink()
    gone = r"episode_000003 cannot be written: models/policy/model.pt had been written and is gone"
    with pytest.raises(CheckpointError, match=gone):
        draft.commit(STATE, known)
    many = {f"models/{number}": known["models/policy/model.pt"] for number in range(7)}
    with pytest.raises(CheckpointError, match=r"models/0, .*, models/4 and 2 more had been"):
        draft.commit(STATE, many)
    assert find_checkpoints(tmp_path) == []
    path.write_bytes(b"12345")
    verify_checkpoint(draft.commit(STATE, known))


def test_the_newest_good_checkpoint_is_found_with_the_reasons_for_the_others(tmp_path):
    runs = [tmp_path / "a", tmp_path / "b"]
    save(runs[0], 1, created_s=1.0)
    good = save(runs[0], 2, created_s=3.0)
    other = begin_checkpoint(runs[1], 1).commit(replace(STATE, trained=("v",), created_s=4.0))
    bad = save(runs[1], 9, created_s=5.0)
    damage(bad / "models/policy/model.pt", "changed")
    found = find_newest(runs, ("policy",))
    assert found.checkpoint == good
    assert [path for path, _ in found.skipped] == [bad, other]
    assert "checksum differs" in found.skipped[0][1]
    assert found.skipped[1][1] == "it trains v; this run trains policy"
    assert find_newest([tmp_path / "none"]).checkpoint is None


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_within_a_run_the_later_episode_is_newer_whatever_the_clock_said(tmp_path, names):
    run, other = (tmp_path / name for name in names)
    save(run, 2, created_s=100.0)
    third = save(run, 3, created_s=10.0)
    second = save(other, 2, created_s=50.0)
    assert find_newest([tmp_path / "a", tmp_path / "b"]).checkpoint == third
    later = save(other, 3, created_s=101.0)
    found = find_newest([tmp_path / "a", tmp_path / "b"])
    assert (found.checkpoint, found.skipped) == (later, ())
    damage(later / "run_state.json", "cut short")
    os.utime(later, (1.0, 1.0))
    damage(third / "run_state.json", "cut short")
    os.utime(third, (1.0, 1.0))
    found = find_newest([tmp_path / "a", tmp_path / "b"])
    assert found.checkpoint == run / "episode_000002"
    assert [path for path, _ in found.skipped] == [third]
    assert second.is_dir()


def test_the_newest_good_checkpoint_is_never_removed(tmp_path):
    for episode in (1, 2, 3):
        save(tmp_path, episode)
    for episode, kind in ((2, "cut short"), (3, "changed")):
        damage(tmp_path / f"episode_00000{episode}/models/policy/model.pt", kind)
    assert prune_checkpoints(tmp_path, 1) == []
    assert find_newest([tmp_path]).checkpoint == tmp_path / "episode_000001"


def test_what_a_save_left_half_written_is_never_seen(tmp_path):
    good = save(tmp_path, 1)
    draft = begin_checkpoint(tmp_path, 2)
    (draft.folder / "models" / "half").write_text("")
    assert find_newest([tmp_path]).checkpoint == good
