"""The schedule of faults is seeded, complete, and cut to runs."""

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
