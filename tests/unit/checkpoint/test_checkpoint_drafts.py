"""Drafts that dead runs left behind are removed; those of whoever may still write are not."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from chatlearn.checkpoint.drafts import current_writer, remove_dead_drafts, remove_drafts
from chatlearn.checkpoint.folders import begin_checkpoint

RECORD = ".writer.json"
LONG_AGO_S = 1.0
TWO_DAYS_S = 2 * 24 * 3600.0


@pytest.fixture
def draft(tmp_path):
    """A draft of this process with a file in it."""
    found = begin_checkpoint(tmp_path / "checkpoints", 3).folder
    (found / "models" / "half").write_text("12345")
    return found


@pytest.fixture(scope="module")
def ended():
    """A writer like this process, but that it has ended."""
    script = (
        "import json; from dataclasses import asdict;"
        "from chatlearn.checkpoint.drafts import current_writer;"
        "print(json.dumps(asdict(current_writer())))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout
    return replace(current_writer(), **json.loads(out))


def remove(draft, writer=None):
    """Whether the draft is removed where this is its record; None: there is none."""
    record = draft.parent / RECORD
    if writer is None:
        record.unlink()
    else:
        record.write_text(json.dumps(asdict(writer)))
    removed = remove_dead_drafts([draft.parent])
    assert removed == ([] if draft.is_dir() else [draft])
    return bool(removed)


def let_age(draft, changed_s):
    for path in (*draft.rglob("*"), draft):
        os.utime(path, (changed_s, changed_s))


def test_a_draft_is_begun_with_a_record_of_its_writer(draft):
    assert json.loads((draft.parent / RECORD).read_text()) == asdict(current_writer())
    assert remove_dead_drafts([draft.parent]) == []


def test_a_dead_process_s_draft_goes_and_what_it_was_removing(draft, ended):
    half_gone = draft.with_name(".episode_000001.removed")
    half_gone.mkdir()
    (draft.parent / "episode_000002").mkdir()
    (draft.parent / RECORD).write_text(json.dumps(asdict(ended)))
    assert remove_dead_drafts([draft.parent]) == [half_gone, draft]
    assert sorted(path.name for path in draft.parent.iterdir()) == [RECORD, "episode_000002"]


def test_a_later_process_of_the_same_number_is_another(draft):
    here = current_writer()
    assert remove(draft, replace(here, start_ticks=here.start_ticks + 1))


def test_a_process_that_nobody_has_waited_for_is_dead(draft):
    child = subprocess.Popen([sys.executable, "-c", ""])
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        stat = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        writer = replace(current_writer(), process_id=child.pid, start_ticks=int(stat[19]))
        assert remove(draft, writer)
    finally:
        child.wait()


def test_another_host_s_draft_stays_however_old_it_is(draft, ended):
    let_age(draft, LONG_AGO_S)
    assert not remove(draft, replace(ended, host="elsewhere"))


def test_after_a_restart_of_the_host_what_is_older_goes(draft, ended):
    before = replace(ended, boot_id="another")
    # A host of the same name may write it now.
    assert not remove(draft, before)
    let_age(draft, time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - 60.0)
    assert remove(draft, before)


@pytest.mark.parametrize("has_record", [True, False])
def test_where_nobody_can_tell_it_stays_for_a_day(draft, ended, has_record):
    writer = replace(ended, pid_namespace=1) if has_record else None
    assert not remove(draft, writer)
    let_age(draft, time.time() - TWO_DAYS_S)
    (draft / "models" / "half").write_text("123456")
    assert remove_dead_drafts([draft.parent]) == []
    let_age(draft, time.time() - TWO_DAYS_S)
    assert remove_dead_drafts([draft.parent]) == [draft]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"host": 1}', '{"process_id": -1}', "[" * 100_000]
)
def test_a_damaged_record_is_none(draft, text):
    known = asdict(current_writer())
    content = {**known, **json.loads(text)} if text.startswith('{"') else None
    (draft.parent / RECORD).write_text(text if content is None else json.dumps(content))
    assert remove_dead_drafts([draft.parent]) == []


def test_a_run_removes_its_own_drafts(draft):
    remove_drafts(draft.parent)
    assert not draft.exists()
