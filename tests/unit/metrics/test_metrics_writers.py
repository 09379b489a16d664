"""Metric files."""

import importlib.util
import json
from pathlib import Path

import pytest

from chatlearn.errors import ChatLearnError, ConfigError
from chatlearn.metrics.writers import JsonLinesWriter, MetricLog, TensorBoardWriter, WandbWriter


class Recorder:
    def __init__(self):
        self.events = []

    def write(self, step, metrics):
        self.events.append((step, dict(metrics)))

    def close(self):
        self.events.append("closed")


def test_json_lines_hold_a_step_each_and_are_there_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write(1, {"train/loss": 0.5, "eval/reward": 0.25})
    assert path.read_text() == '{"step": 1, "eval/reward": 0.25, "train/loss": 0.5}\n'
    writer.write(2, {"train/loss": 0.125})
    writer.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [1, 2]


def test_json_lines_are_appended_to(tmp_path):
    for step in (1, 2):
        writer = JsonLinesWriter(tmp_path / "metrics.jsonl")
        writer.write(step, {})
        writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_the_log_writes_everywhere_and_keeps_what_was_written():
    one, two = Recorder(), Recorder()
    log = MetricLog([one, two])
    metrics = {"loss": 1.0}
    log.write(3, metrics)
    metrics["loss"] = 9.0
    log.close()
    log.close()
    assert log.history == [{"step": 3.0, "loss": 1.0}]
    assert one.events == two.events == [(3, {"loss": 1.0}), "closed"]


def test_a_full_disk_names_the_file_and_what_to_do():
    writer = JsonLinesWriter(Path("/dev/full"))
    said = "^/dev/full cannot be written: No space left on device: make room there"
    with pytest.raises(ChatLearnError, match=said):
        writer.write(1, {"loss": 0.5})
    with pytest.raises(ChatLearnError, match=said):
        writer.close()


def test_every_writer_is_closed_also_where_the_first_cannot_be():
    class Full(Recorder):
        def close(self):
            super().close()
            raise ChatLearnError("full")

    one, two = Full(), Full()
    with pytest.raises(ChatLearnError, match="full"):
        MetricLog([one, two]).close()
    assert one.events == two.events == ["closed"]


def test_tensorboard_files_hold_the_scalars(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    writer = TensorBoardWriter(tmp_path)
    writer.write(2, {"train/loss": 0.5})
    writer.close()
    found = event_accumulator.EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(2, 0.5)]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_weights_and_biases_must_be_installed_to_be_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="runtime.enable_wandb: wandb is not installed"):
        WandbWriter("project", None, tmp_path)
