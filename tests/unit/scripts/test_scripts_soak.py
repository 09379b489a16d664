"""The schedule of faults is seeded, complete, and cut to runs."""

import signal
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from chatlearn.checkpoint.folders import begin_checkpoint
from chatlearn.checkpoint.run_state import RunState
from chatlearn.models.plain_weights import write_state
from scripts.faults.campaign import Account, Outcome, Report
from scripts.faults.checkpoints import find_bad_checkpoints, load_whole
from scripts.faults.modules import suffer, while_writing
from scripts.faults.nodes import plan_losses
from scripts.faults.save_kills import SaveKills
from scripts.faults.traces import MARK
from scripts.faults.workload import FAULTS, read_account, read_metrics, write_workload
from scripts.soak import SHORT, plan_faults

PLACES = {(model, stage) for model, stages in FAULTS.items() for stage in stages}


def test_a_schedule_is_the_same_for_a_seed_and_covers_every_place():
    runs = plan_faults(60, seed=3)
    assert runs == plan_faults(60, seed=3)
    assert runs != plan_faults(60, seed=4)
    faults = [fault for run in runs for fault in run]
    assert len(faults) == 60
    assert {(fault.model, fault.stage) for fault in faults} == PLACES
    assert {"kill", "stop", "exit", "driver"} <= {fault.kind for fault in faults}
    assert max(map(len, runs)) <= 12


def test_the_short_schedule_has_twelve_faults_over_all_stages():
    assert len(SHORT) == 12
    assert {(fault.model, fault.stage) for fault in SHORT} <= PLACES
    assert {fault.stage for fault in SHORT} == {stage for _, stage in PLACES}


def test_an_update_that_is_repeated_counts_the_last_time(tmp_path):
    write_workload(tmp_path, 2, is_wide=False)
    for name, digest in (("20260101", "old"), ("20260102", "new")):
        run = tmp_path / "runs" / "soak" / name
        run.mkdir(parents=True)
        note = '{"at": ["trainer", 0, 0], "rows": 3, "digest": "%s"}\n{"at": ["trai'
        (run / "trained-trainer-0.jsonl").write_text(note % digest)
        (run / "metrics.jsonl").write_text('{"step": 1, "time/episode": 3.0}\n')
    assert read_account(tmp_path) == {'["trainer", 0, 0]': "new"}
    assert read_metrics(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("model", ["policy_trainer", "value_trainer"])
def test_every_second_fault_of_a_models_saves_strikes_the_thread_that_writes(model):
    faults = [fault for run in plan_faults(60, seed=0) for fault in run]
    moments = [each.moment for each in faults if (each.model, each.stage) == (model, "saving")]
    start = 0 if model == "policy_trainer" else 1
    assert moments == [("", "writing")[(start + at) % 2] for at in range(len(moments))]
    assert len(moments) >= 4


def test_nodes_are_lost_at_every_stage_killed_and_cut_off():
    losses = plan_losses(12, seed=0, has_spaces=True)
    assert losses == plan_losses(12, seed=0, has_spaces=True)
    stages = {stage for _, stage in PLACES}
    assert {loss.stage for loss in losses[:6]} == {loss.stage for loss in losses[6:]} == stages
    assert sum(loss.is_cut for loss in losses[:6]) == 3
    assert not any(loss.is_cut for loss in plan_losses(6, seed=0, has_spaces=False))


def _report(trained, metrics):
    report = Report([Outcome("kill", "policy", "sync", "rolled back", 1.0, survived=True)])
    report.compare(Account(trained, metrics), Account({"0": "a"}, [{"loss": 1.0}]))
    return report


def test_a_run_that_comes_to_the_same_is_survived():
    report = _report({"0": "a"}, [{"loss": 1.0}])
    assert report.is_good
    assert report.to_json()["survived"] == 1


def test_faults_of_a_run_whose_metrics_differ_are_not_survived():
    report = _report({"0": "a"}, [{"loss": 1.5}])
    assert not report.is_good
    found = report.to_json()
    assert (found["survived"], found["same_metrics"], found["same_training_samples"]) == (
        0,
        False,
        True,
    )
    assert found["rows"][0]["outcome"] == "rolled back; the metrics differ"


def test_what_is_left_is_not_good():
    report = _report({"0": "a"}, [{"loss": 1.0}])
    report.add(Report(left=["a process"]))
    assert not report.is_good
    assert report.same_metrics


KILLS = SaveKills(
    kills=3,
    resumed=3,
    while_writing=2,
    ended=True,
    same_metrics=True,
    left=[],
    last_episode=9,
)


@pytest.mark.parametrize(
    "change", [{"resumed": 2}, {"ended": False}, {"same_metrics": False}, {"left": ["bad"]}]
)
def test_kills_while_saving_are_good_only_where_all_is(change):
    assert KILLS.is_good
    assert not replace(KILLS, **change).is_good


class Saving:
    """What the faults of a save look at."""

    def __init__(self, folder):
        self.name, self.rank, self.checkpoint_dir = "trainer", 0, folder
        self.module_args = SimpleNamespace(args={"moments": str(folder)})


def test_a_fault_of_writing_strikes_when_the_file_is_there_in_part(tmp_path):
    with subprocess.Popen(["sleep", "60"]) as driver:
        (tmp_path / "driver.pid").write_text(str(driver.pid))
        (tmp_path / "trainer.writing").write_text("driver")

        def job():
            path = tmp_path / "__0_0.distcp"
            path.write_bytes(b"half")
            assert driver.wait(20) == -signal.SIGKILL
            return [path]

        assert while_writing(Saving(tmp_path), job)() == [tmp_path / "__0_0.distcp"]
        driver.kill()
    assert not (tmp_path / "trainer.writing").exists()


def test_only_workers_of_the_node_that_is_lost_take_its_moment(tmp_path, monkeypatch):
    (tmp_path / "driver.pid").write_text("1")
    (tmp_path / "node.mark").write_text("second")
    (tmp_path / "node.training").write_text("none")
    monkeypatch.setenv(MARK, "first")
    suffer(Saving(tmp_path), "training")
    assert (tmp_path / "node.training").exists()
    monkeypatch.setenv(MARK, "second")
    suffer(Saving(tmp_path), "training")
    (claimed,) = tmp_path.glob("done.*")
    assert claimed.name.startswith("done.node.training.trainer.")


def _save(run_dir, trained=("policy",)):
    draft = begin_checkpoint(run_dir / "checkpoints", 1)
    for name in trained:
        write_state(draft.model_folder(name) / "model.pt", {"weight": torch.ones(2)})
    torch.save({"turn": 1}, draft.folder / "relay.pt")
    return draft


STATE = RunState(1, 1, 4, (4,), 3, (8,), trained=("policy", "value"))


def test_a_checkpoint_is_good_when_all_of_it_loads(tmp_path):
    path = _save(tmp_path, STATE.trained).commit(STATE)
    assert load_whole(path) == 2
    assert find_bad_checkpoints([tmp_path]) == []


def test_a_checkpoint_without_a_trained_models_folder_is_bad(tmp_path):
    _save(tmp_path).commit(STATE)
    (bad,) = find_bad_checkpoints([tmp_path])
    assert "models/ lacks value" in bad


def test_a_checkpoint_whose_sums_are_right_but_that_does_not_load_is_bad(tmp_path):
    draft = _save(tmp_path, STATE.trained)
    (draft.model_folder("value") / "model.pt").write_bytes(b"no tensors")
    draft.commit(STATE)
    (bad,) = find_bad_checkpoints([tmp_path])
    assert "does not load" in bad
