"""How a run's log ends where its files cannot be written."""

import logging
from pathlib import Path

import pytest

from chatlearn.cli.main import run_to_exit_code
from chatlearn.engine.run_log import RunLog
from chatlearn.errors import ChatLearnError, WorkerError
from chatlearn.metrics.run_folder import RunFolder
from chatlearn.metrics.timeline import Timeline
from chatlearn.metrics.writers import JsonLinesWriter, MetricLog

FULL = Path("/dev/full")


class Display:
    def __init__(self):
        self.is_closed = False

    def episode(self, episode, num_episodes, metrics):
        pass

    def close(self):
        self.is_closed = True


def open_log(folder, metrics_file):
    timeline = Timeline(folder / "timeline.json")
    return RunLog(
        RunFolder(folder), MetricLog([JsonLinesWriter(metrics_file)]), timeline, Display()
    )


def write_all(log):
    with log:
        log.write(0, 1, {"loss": 0.5})


def test_a_full_disk_ends_the_run_in_one_line(tmp_path, capsys, caplog):
    log = open_log(tmp_path, FULL)
    assert run_to_exit_code(lambda: write_all(log)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: /dev/full cannot be written: No space left on device: make room")
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert caplog.records == []
    assert log.progress.is_closed


def test_a_disk_that_is_full_at_the_end_ends_the_run_in_one_line(tmp_path):
    log = open_log(tmp_path, FULL)
    # What a buffer still holds is written when the file is closed.
    log.metrics._writers[0]._file.write("{}")
    with pytest.raises(ChatLearnError, match="/dev/full cannot be written: No space left"), log:
        pass
    assert log.progress.is_closed


def test_a_run_folder_that_is_gone_ends_the_run_in_one_line(tmp_path):
    log = open_log(tmp_path / "gone", tmp_path / "metrics.jsonl")
    gone = "gone/timeline.json cannot be written: No such file or directory: was its folder removed"
    with pytest.raises(ChatLearnError, match=gone), log:
        pass
    assert log.progress.is_closed


def test_another_error_on_its_way_stays_the_error(tmp_path, caplog):
    log = open_log(tmp_path / "gone", FULL)
    log.metrics._writers[0]._file.write("{}")
    with caplog.at_level(logging.WARNING), pytest.raises(WorkerError, match="it died"), log:
        raise WorkerError("it died", model_name="policy", rank=0)
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(" cannot be written: ")[0] for text in told] == [
        str(tmp_path / "gone/timeline.json"),
        "/dev/full",
    ]
