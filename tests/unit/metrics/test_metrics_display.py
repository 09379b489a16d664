"""The run folder, the timeline and the progress lines."""

import io
import json
import re

import pytest

from chatlearn.errors import ChatLearnError, ConfigError
from chatlearn.metrics.progress import PlainProgress, format_episode
from chatlearn.metrics.run_folder import RunFolder
from chatlearn.metrics.timeline import Timeline


def test_a_run_is_a_folder_of_its_own(tmp_path):
    folders = [RunFolder.create(str(tmp_path), "demo", "seed: 1\n") for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    for folder in folders:
        assert folder.path.parent == tmp_path / "demo"
        assert re.fullmatch(r"\d{8}-\d{6}(-\d)?", folder.path.name)
        names = {path.name for path in folder.path.iterdir()}
        assert names == {"config.yaml", "checkpoints", "logs", "tensorboard"}
        assert (folder.path / "config.yaml").read_text() == "seed: 1\n"


def test_the_files_of_a_run_have_fixed_names(tmp_path):
    folder = RunFolder(tmp_path)
    found = (folder.metrics_file, folder.timeline_file, folder.tensorboard_dir)
    assert found == tuple(tmp_path / n for n in ("metrics.jsonl", "timeline.json", "tensorboard"))
    assert (folder.checkpoints_dir, folder.logs_dir) == (
        tmp_path / "checkpoints",
        tmp_path / "logs",
    )


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", "a\nb", "a\x1b[2J", "-rf"])
def test_the_experiments_name_is_a_plain_folder_name(tmp_path, name):
    with pytest.raises(ConfigError, match="runtime.exp_name: expected a plain folder name"):
        RunFolder.create(str(tmp_path), name, "")


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="runtime.output_dir: .*file/demo: Not a directory"):
        RunFolder.create(str(tmp_path / "file"), "demo", "")


def test_a_timeline_whose_folder_is_gone_says_so(tmp_path):
    timeline = Timeline(tmp_path / "run/timeline.json")
    gone = r"run/timeline.json cannot be written: No such file or directory: was its folder removed"
    with pytest.raises(ChatLearnError, match=gone):
        timeline.write()


def test_the_timeline_is_a_chrome_trace_with_a_row_for_each_lane(tmp_path):
    timeline = Timeline(tmp_path / "timeline.json")
    timeline.add("forward_step", "policy[0]", 10.0, 10.5)
    timeline.write()
    timeline.add("train_step", "trainer[0]", 11.0, 10.0)
    timeline.add("forward_step", "policy[0]", 12.0, 13.0)
    timeline.write()
    timeline.write()
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [(lanes[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("policy[0]", "forward_step", 10e6, 0.5e6),
        ("trainer[0]", "train_step", 11e6, 0.0),
        ("policy[0]", "forward_step", 12e6, 1e6),
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.json"]


def test_a_timeline_is_valid_after_every_write_and_forgets_its_older_half(tmp_path):
    path = tmp_path / "timeline.json"
    timeline = Timeline(path, max_spans=4)
    timeline.write()
    assert json.loads(path.read_text()) == {"traceEvents": []}
    seen = []
    for number in range(7):
        timeline.add(str(number), f"lane {number % 2} é", number, number + 1)
        timeline.write()
        events = json.loads(path.read_text())["traceEvents"]
        seen.append([event["name"] for event in events if event["ph"] == "X"])
    assert seen[3:] == [list("0123"), list("34"), list("345"), list("3456")]
    names = {e["args"]["name"] for e in events if e["ph"] == "M"}
    assert names == {"lane 0 é", "lane 1 é"}


def test_an_episode_is_one_line_of_what_matters_most():
    metrics = {
        "rollout/reward": 0.51234,
        "eval/reward": 0.25,
        "train/trainer/kl": 0.001,
        "train/trainer/loss": -1.5,
        "train/value/loss": 2.0,
        "train/trainer/grad_norm": 9.0,
        "time/episode": 3.21,
    }
    assert format_episode(0, 10, metrics) == (
        "episode 1/10  reward 0.5123  eval reward 0.25  trainer kl 0.001  trainer loss -1.5  "
        "value loss 2  3.2 s"
    )
    assert format_episode(9, 10, {}) == "episode 10/10"


def test_plain_progress_writes_a_line_per_message_and_none_per_stage():
    stream = io.StringIO()
    progress = PlainProgress(stream)
    progress.stage("policy.forward_step", 3, 10)
    progress.message("started")
    progress.episode(1, 2, {"rollout/reward": 1.0})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [re.sub(r"^\[ *\d+\.\ds\] ", "", line) for line in lines] == [
        "started",
        "episode 2/2  reward 1",
    ]
