"""The demo's frame: checkpoint names, report, exit codes; its training is tried elsewhere."""

import argparse
import json
import time

import pytest

from chatlearn.engine.result import RunResult
from chatlearn.engine.run import Terminated
from scripts.demo import report, run
from scripts.demo.flows import AdditionEvaluator
from scripts.demo.problems import Problem

OPTIONS = argparse.Namespace(algo="ppo", reward="rule", seed=0)


def checkpoint(run_dir, episode):
    folder = run_dir / "checkpoints" / f"episode_{episode:06d}" / "models" / "warm_start"
    folder.mkdir(parents=True)
    return folder


def test_a_stable_name_leads_to_the_newest_checkpoint(tmp_path):
    first = checkpoint(tmp_path / "demo_warm_start" / "a", 7)
    link = run.name_checkpoint(tmp_path, tmp_path / "demo_warm_start" / "a", "warm_start")
    assert link.resolve() == first
    checkpoint(tmp_path / "demo_warm_start" / "b", 7)
    second = checkpoint(tmp_path / "demo_warm_start" / "b", 14)
    assert run.name_checkpoint(tmp_path, tmp_path / "demo_warm_start" / "b", "warm_start") == link
    assert (tmp_path / "warm_start").resolve() == second


@pytest.mark.parametrize(
    ("stop", "code", "words"),
    [(KeyboardInterrupt(), 130, "interrupted\n"), (Terminated("SIGTERM"), 143, "SIGTERM\n")],
)
def test_a_signal_ends_the_demo_with_a_message(tmp_path, monkeypatch, capsys, stop, code, words):
    def stopped(*_):
        raise stop

    monkeypatch.setattr(run, "_run_config", stopped)
    monkeypatch.setenv("DEMO_DIR", "")
    assert run.main(["--output", str(tmp_path)]) == code
    assert capsys.readouterr().err.endswith(words)


def test_the_evaluator_tells_carry_free_answers_from_other_mistakes():
    problem = Problem(7, 45)
    rows = [
        {"prompt": problem.prompt, "response": response, "exact_match": float(response == "052")}
        for response in ("052", "042", "051", "052")
    ]
    metrics = AdditionEvaluator(lambda batch: batch).post_process({"verifier": rows}, {})
    assert metrics == {"exact_match": 0.5, "right_or_carry_free": 0.75}


def summary_of(tmp_path, capsys, exact_match, share):
    before = {"step": 0, "eval/exact_match": exact_match, "eval/right_or_carry_free": share}
    after = {"step": 12, "eval/exact_match": 0.96, "eval/right_or_carry_free": 0.98}
    rows = [{"prompt": "01+02=", "response": "003", "answer": "003"}]
    result = RunResult(tmp_path, [], {"verifier": rows}, [before, after])
    report.write_report(result, [Problem(1, 2)], OPTIONS, time.time())
    return json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr().out


def test_the_report_says_what_the_warm_start_was(tmp_path, capsys):
    summary, text = summary_of(tmp_path, capsys, 0.53, 0.96)
    assert summary["warm_start_exact_match"] == 0.53
    assert summary["warm_start_right_or_carry_free"] == 0.96
    assert "Warm start: 53.0% right, 96.0% right or carry-free." in text
    assert "WARNING" not in text


@pytest.mark.parametrize(
    ("exact_match", "share", "words"),
    [
        (0.40, 0.96, "exact match is 40.0%, expected 45% to 65%"),
        (0.66, 0.96, "exact match is 66.0%"),
        (0.50, 0.90, "90.0% of the answers are right or carry-free, expected 95% or more"),
    ],
)
def test_a_warm_start_off_its_aim_is_a_warning(tmp_path, capsys, exact_match, share, words):
    _, text = summary_of(tmp_path, capsys, exact_match, share)
    assert f"WARNING: the warm start: {words}" in text


def test_the_seconds_include_the_drawing(tmp_path, capsys, monkeypatch):
    def draw(path, *_):
        assert not (tmp_path / "summary.json").exists()
        time.sleep(0.3)
        return path

    monkeypatch.setattr(report, "draw_curve", draw)
    summary, _ = summary_of(tmp_path, capsys, 0.53, 0.96)
    assert summary["wall_s"] >= 0.3
