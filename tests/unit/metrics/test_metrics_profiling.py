"""Kernel timelines and their summary."""

import json

import torch

from chatlearn.metrics.profiling import (
    OperatorTime,
    StageProfile,
    StageProfiler,
    format_profiles,
)


def test_each_call_is_profiled_and_summed_up_by_its_stage(tmp_path):
    profiler = StageProfiler(has_gpu=False)
    for stage, count in (("forward_step", 2), ("forward_step", 1), ("train_step", 1)):
        with profiler.record(stage):
            for _ in range(count):
                torch.ones(8).exp()
        profiler.add_tokens(10 * count)
    profiles = {each.stage: each for each in profiler.finish(tmp_path / "new" / "policy.0.json")}
    assert [(p.num_calls, p.num_tokens) for p in profiles.values()] == [(2, 30), (1, 10)]
    exp = {
        p.stage: {o.name: o.num_calls for o in p.operators}["aten::exp"] for p in profiles.values()
    }
    assert exp == {"forward_step": 3, "train_step": 1}
    trace = json.loads((tmp_path / "new" / "policy.0.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::exp" for event in trace) == 4
    assert profiler.finish(tmp_path / "again.json") == ()


def test_the_summary_names_the_costliest_operators_of_all_ranks():
    def rank(seconds, tokens, *operators):
        return [StageProfile("forward_step", 2, seconds, tokens, operators)]

    text = format_profiles(
        {
            "policy": [
                rank(2.0, 100, OperatorTime("mm", 3, 0.5, 0.0), OperatorTime("exp", 1, 0.1, 0.0)),
                rank(1.0, 0, OperatorTime("mm", 3, 0.4, 0.0)),
            ]
        }
    )
    assert text.splitlines() == [
        "policy.forward_step: 2.000 s on the longest of 2 ranks, 4 calls, 100 tokens, 50 tokens/s",
        "      own s  share    calls  operator (all ranks together)",
        "     0.9000  90.0%        6  mm",
        "     0.1000  10.0%        1  exp",
    ]
