"""The pure parts of the benchmarks beside peers: arithmetic, measures, memory, turns."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

from scripts.bench import generate_vs_transformers, grpo_vs_trl, train_vs_transformers
from scripts.bench.gpu import ONE_BILLION, compute_decode_bound
from scripts.bench.limits import measure_copy
from scripts.bench.measures import (
    Measure,
    compute_rates,
    find_best_peer,
    print_measures,
    spread,
)
from scripts.bench.memory import PeakMemory, read_pss, read_tree_pss
from scripts.bench.sides.steps import StepPlan, build_steps
from scripts.bench.timeline_overhead import (
    Span,
    compute_overhead,
    covered_seconds,
    read_spans,
    sum_by_model,
)
from scripts.bench.workload import BENCH_SHAPE, Shape, draw_lengths, draw_rows

TINY = Shape(1, 4, 8, 2, 1, 10, 16)


def test_parameters_are_counted_by_hand():
    # Q and output 16 each, K and V 8 each, three MLP matrices of 32, three norms, two ends of 40.
    assert TINY.layer_weights == 16 + 16 + 8 + 8 + 3 * 32
    assert TINY.num_parameters == 144 + 3 * 4 + 2 * 40


def test_the_benchmark_model_has_four_million_parameters():
    assert BENCH_SHAPE.num_parameters == 4_196_608


def test_flops_of_a_forward_pass_are_those_of_its_products():
    # Matrices 2 * 144 * 2, attention 4 * 4 * (1 + 2), output layer 2 * 2 * 10 * 4.
    assert TINY.forward_flops(2) == 576 + 48 + 160
    assert TINY.forward_flops(2, num_logits=1) == 576 + 48 + 80
    assert TINY.training_flops(2) == 3 * (576 + 48 + 160)


def test_decoding_token_by_token_costs_what_one_pass_costs():
    steps = sum(BENCH_SHAPE.forward_flops(1, start=at) for at in range(20))
    assert steps == BENCH_SHAPE.forward_flops(20)


def test_the_cache_holds_keys_and_values_of_every_layer():
    assert BENCH_SHAPE.cache_bytes(1, 4) == 2 * 4 * 128 * 4


def test_lengths_are_long_tailed_and_capped():
    lengths = draw_lengths(random.Random(0), 4000, 512)
    assert (min(lengths), max(lengths)) == (8, 512)
    assert sorted(lengths)[2000] == pytest.approx(64, abs=6)
    assert sum(lengths) / 4000 == pytest.approx(105, abs=12)


def test_rows_have_the_lengths_asked_for_and_repeat():
    rows = draw_rows(3, [9, 30], 512)
    assert [(len(row), len(row.prompt)) for row in rows] == [(9, 3), (30, 10)]
    assert rows == draw_rows(3, [9, 30], 512)


def test_steps_cut_every_row_into_micro_batches():
    steps = build_steps(StepPlan(5, 2, 64, is_variable=True), 512)
    first, second = next(steps), next(steps)
    assert [len(rows) for rows in first] == [2, 2, 1]
    assert first != second
    assert next(build_steps(StepPlan(5, 2, 64, is_variable=True), 512)) == first


def test_the_spread_is_that_of_the_extremes_over_the_median():
    assert spread([9, 10, 12]) == pytest.approx(0.3)


def test_rates_are_amounts_over_seconds_and_the_best_peer_is_the_fastest():
    reports = [{"seconds": 2.0, "amounts": {"tokens": 10}}]
    assert compute_rates(reports, "tokens") == [5.0]
    rates = {"ours": [9.0], "peer a": [1.0, 5.0, 2.0], "peer b": [3.0, 3.0, 3.0]}
    assert find_best_peer(rates, "ours") == "peer b"


@pytest.mark.parametrize(("is_cap", "ratio", "is_met"), [(False, 2.0, True), (True, 0.5, False)])
def test_a_ratio_at_its_bar_or_above_is_good(is_cap, ratio, is_met):
    measure = Measure("m", "", 6.0, 3.0, "x", 1.5, is_cap=is_cap)
    assert (measure.ratio, measure.is_met) == (ratio, is_met)


def test_the_last_line_is_one_json_object(capsys):
    measure = Measure("m", "what", 4.0, 2.0, "x", 1.5, details={"dtype": "float32"})
    print_measures("title", [measure], [measure], as_json=True)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["machine"]["cores"] == os.cpu_count()
    assert found["other"] == found["measures"]
    assert found["measures"] == {
        "m": {
            "ours": 4.0,
            "peer": 2.0,
            "ratio": 2.0,
            "bar": 1.5,
            "is_met": True,
            "what": "what",
            "unit": "x",
            "dtype": "float32",
        }
    }


def test_covered_seconds_count_overlaps_once_and_clip():
    spans = [Span(0, 2), Span(1, 3), Span(5, 9), Span(20, 30)]
    assert covered_seconds(spans, Span(1, 7)) == 2 + 2
    assert compute_overhead(spans, [Span(0, 5)]) == [pytest.approx(0.4)]


def test_spans_are_read_from_a_run_and_summed_by_model(tmp_path):
    events = [
        {"ph": "M", "name": "thread_name", "tid": 0, "args": {"name": "policy[0]"}},
        {"ph": "M", "name": "thread_name", "tid": 1, "args": {"name": "policy[1]"}},
        {"ph": "X", "name": "sync", "ts": 1e6, "dur": 5e5, "tid": 0},
        {"ph": "X", "name": "environment: forward_step", "ts": 2e6, "dur": 1e6, "tid": 0},
        {"ph": "X", "name": "environment: forward_step", "ts": 2e6, "dur": 2e6, "tid": 1},
        {"ph": "X", "name": "environment: forward_step", "ts": 5e6, "dur": 5e6, "tid": 1},
    ]
    (tmp_path / "timeline.json").write_text(json.dumps({"traceEvents": events}))
    spans = read_spans(tmp_path / "timeline.json")
    assert spans[:2] == [Span(1.0, 1.5, "sync"), Span(2.0, 3.0, "policy")]
    assert sum_by_model(spans, [Span(0, 3)]) == {"policy": 3.0, "sync": 0.5}
    assert sum_by_model(spans, [Span(0, 3), Span(4, 6)]) == {"policy": 4.0, "sync": 0.25}


def test_memory_of_this_process_is_read_and_that_of_none_is_nothing():
    own = read_pss(os.getpid())
    assert 1e6 < own < 1e11
    with PeakMemory(os.getpid()) as memory:
        block = b"x" * (64 << 20)
        assert read_tree_pss(os.getpid()) > own + (32 << 20)
    assert len(block) < memory.peak_bytes - own + (32 << 20)
    assert read_pss(2**22 + 1) == read_tree_pss(2**22 + 1) == 0


def test_the_driver_of_the_grpo_benchmark_never_loads_torch():
    """Its pages would be shared with those of the sides, and halve what they count."""
    code = "import sys, scripts.bench.grpo_vs_trl; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("program", [generate_vs_transformers, grpo_vs_trl, train_vs_transformers])
def test_arguments_that_cannot_be_are_refused(program, capsys):
    with pytest.raises(SystemExit) as caught:
        program.parse_arguments(["--parts", "all-of-it"])
    assert caught.value.code == 2
    assert "--parts" in capsys.readouterr().err


def test_both_sides_of_a_grpo_step_are_told_the_same():
    given = grpo_vs_trl.parse_arguments(["--old-logprobs", "rollout"])
    options = grpo_vs_trl.build_options(given, is_variable=True, num_steps=3)
    assert options["shape"]["vocab_size"] == 128
    assert (options["new_tokens"], options["num_steps"]) == (256, 3)
    assert options["algorithm"] == {"old_logprobs": "rollout"}


def test_plans_of_the_training_steps_are_those_of_the_bars():
    assert train_vs_transformers.build_plan("fixed") == StepPlan(64, 64, 96, is_variable=False)
    assert train_vs_transformers.build_plan("packed").is_variable
    assert train_vs_transformers.build_plan("mfu", mfu_rows=4).num_rows == 4


def test_the_decoding_bound_of_one_sequence_is_that_of_the_weights():
    assert ONE_BILLION.num_parameters == pytest.approx(1.1e9, rel=0.05)
    one, many = (
        compute_decode_bound(ONE_BILLION, batch, prompt=128, new_tokens=128, bytes_per_s=3e12)
        for batch in (1, 64)
    )
    assert one == pytest.approx(3e12 / 2.08e9, rel=0.02)
    assert 50 * one < many < 64 * one


def test_a_copy_of_memory_has_a_rate():
    assert 1e7 < measure_copy(1 << 20) < 1e12
