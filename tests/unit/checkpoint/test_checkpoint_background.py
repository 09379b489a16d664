"""Files are written beside the work, and receipts tell how that ended."""

import shutil
import threading
import time
from types import SimpleNamespace

import pytest

from chatlearn.checkpoint.background import FileWriter, await_receipts, receipt_name
from chatlearn.checkpoint.manifest import sum_file
from chatlearn.errors import CheckpointError, WaitTimeoutError

NAME = receipt_name("policy", 0, 1)


def later(seconds=30.0):
    return time.monotonic() + seconds


@pytest.fixture
def folder(tmp_path):
    (tmp_path / ".receipts").mkdir()
    return tmp_path


def start(writer, folder, *, is_async):
    writer.start(folder, folder / ".receipts" / NAME, is_async=is_async)


@pytest.mark.parametrize("is_async", [True, False])
def test_a_receipt_has_the_sums_of_what_was_written(folder, is_async):
    def job():
        (folder / "weights").write_bytes(b"12345")
        return [folder / "weights"]

    writer = FileWriter()
    writer.submit(job)
    writer.submit(lambda: None)
    start(writer, folder, is_async=is_async)
    sums = await_receipts(folder / ".receipts", [NAME], later())
    assert dict(sums) == {"weights": sum_file(folder / "weights")}
    assert sums["weights"].num_bytes == 5


@pytest.mark.parametrize("is_async", [True, False])
def test_what_goes_wrong_is_told_with_the_worker(folder, is_async):
    def job():
        raise OSError("the disk is full")

    writer = FileWriter()
    writer.submit(job)
    start(writer, folder, is_async=is_async)
    with pytest.raises(CheckpointError, match=r"policy.r0.1: OSError: the disk is full"):
        await_receipts(folder / ".receipts", [NAME], later())


def test_a_full_disk_is_named_where_a_library_does_not(folder, monkeypatch):
    def job():
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4096))
    writer = FileWriter()
    writer.submit(job)
    start(writer, folder, is_async=False)
    with pytest.raises(CheckpointError, match=r"the disk is full \(RuntimeError: basic_ios"):
        await_receipts(folder / ".receipts", [NAME], later())


def test_writing_goes_on_beside_and_a_second_save_is_refused_meanwhile(folder):
    gate = threading.Event()
    writer = FileWriter(patience_s=0.1)
    writer.submit(lambda: gate.wait(30) and None)
    start(writer, folder, is_async=True)
    with pytest.raises(CheckpointError, match="still being written"):
        start(writer, folder, is_async=True)
    assert not (folder / ".receipts" / NAME).exists()
    gate.set()
    assert await_receipts(folder / ".receipts", [NAME], later()) == {}
    writer.close()
    writer.wait()


def test_receipts_that_do_not_come_are_named(folder):
    with pytest.raises(WaitTimeoutError, match=r"in time: policy.r0.1"):
        await_receipts(folder / ".receipts", [NAME], later(0.1))
    with pytest.raises(CheckpointError, match="given up"):
        await_receipts(folder / ".receipts", [NAME], later(), lambda: True)


def test_a_draft_that_was_given_up_gets_no_receipt(tmp_path):
    writer = FileWriter()
    writer.start(tmp_path, tmp_path / "gone" / NAME, is_async=False)
    assert not (tmp_path / "gone").exists()


def test_a_disk_that_takes_no_receipt_ends_the_wait_for_it(folder, monkeypatch):
    def refuse(path, text):
        raise OSError("no space left")

    monkeypatch.setattr("chatlearn.checkpoint.background.write_aside", refuse)
    start(FileWriter(), folder, is_async=False)
    with pytest.raises(CheckpointError, match="is the disk full"):
        await_receipts(folder / ".receipts", [NAME], later())
