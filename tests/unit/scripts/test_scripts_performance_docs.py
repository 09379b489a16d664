"""The budget of a step, and the generated sections of docs/performance.md."""

from __future__ import annotations

import pytest

from scripts.bench.budget import Stage, StepSize, bound_seconds, list_stages
from scripts.bench.workload import Shape
from scripts.write_performance_docs import fill_section, render_budget, render_measured

SHAPE = Shape(1, 4, 8, 2, 1, 10, 16)
LIMITS = {
    "matmul_gflops": {"float32": {"2": 100.0}},
    "copy_gb_per_s": {"2": 5.0},
}


def test_the_stages_of_a_step_are_counted_by_hand():
    step = StepSize(
        num_prompts=1, num_samples=2, prompt_length=2, response_length=3, element_bytes=2
    )
    stages = {stage.name: stage for stage in list_stages(SHAPE, step)}
    weights = 144 + 40
    # Two rows, two steps; attention reads 3 keys, then 4.
    assert stages["decoding"].flops == 2 * (2 * 2 * weights + 4 * 4 * (3 + 4))
    # A token's cache: keys and values, 2 channels each, 4 bytes.
    assert stages["decoding"].num_bytes == 2 * 2 * weights + 2 * (3 + 4) * 2 * 2 * 4
    # The prompt of two tokens once, behind it three tokens for each of the two rows.
    before = 2 * 144 * 2 + 4 * 4 * 3
    after = 2 * 144 * 3 + 4 * 4 * (3 + 4 + 5) + 2 * 3 * 40
    assert stages["reference"].flops == before + 2 * after
    assert stages["forward and backward"].flops == 3 * stages["reference"].flops
    # In bf16 the weights beside their master copy are written as well.
    assert stages["optimizer"].num_bytes == (36 + 2) * SHAPE.num_parameters


@pytest.mark.parametrize(("flops", "num_bytes", "expected"), [(20, 4, 2.0), (1, 40, 8.0)])
def test_the_tighter_limit_bounds_a_stage(flops, num_bytes, expected):
    assert bound_seconds(Stage("s", flops, num_bytes), flops_per_s=10, bytes_per_s=5) == expected


def test_a_section_is_replaced_and_the_rest_stays():
    page = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert fill_section(page, "x", "new\n") == "a\n<!-- x:begin -->\nnew\n<!-- x:end -->\nb\n"
    with pytest.raises(ValueError, match="y:begin"):
        fill_section(page, "y", "")


def test_the_budget_has_times_only_where_limits_are_known():
    assert "at least" not in render_budget(None)
    lines = render_budget(LIMITS).splitlines()
    assert lines[5] == "| forward and backward | 109.20 | 0.05 | 1092 |"
    assert lines[-1].startswith("Limits of the machine, 2 threads: 100 GFLOP/s in float32, 10.0 GB")


def test_measured_times_stand_beside_the_least_ones():
    stages_ms = {"policy": 300.4, "reference": 90.0, "policy_trainer": 400.0, "sync": 5.0}
    lines = render_budget(LIMITS, {**stages_ms, "reward": 1.0}).splitlines()
    assert lines[0].endswith("| at least, ms | measured, ms |")
    measured = [line.split(" | ")[-1].removesuffix(" |") for line in lines[2:9]]
    with_others = ["with decoding", "300", "90", "400", "with the passes", "5", "796"]
    assert measured == with_others


def test_measures_become_lines_of_a_table():
    measure = {
        "ours": 40.04,
        "peer": 21.83,
        "ratio": 1.834,
        "bar": 1.7,
        "is_met": True,
        "what": "GRPO step",
        "unit": "samples/s",
        "dtype": "float32",
        "peer_dtype": "bfloat16",
        "spread": 0.05,
    }
    machine = {"processor": "P", "cores": 2, "memory_gb": 24.0}
    found = {"machine": machine, "measures": {"m": measure}, "other": {"m": measure}}
    text = render_measured([found], "2026-01-01")
    line = (
        "GRPO step | 40.04 | 21.83 | samples/s | spread 0.05 | float32 / bfloat16 "
        "| 1.83 | 1.7 | yes |\n"
    )
    assert f"| `m` | {line}" in text
    assert f"| `m, ray` | {line}" in text
    assert "Measured on 2026-01-01: P, 2 cores, 24 GB, 2 threads a side." in text
