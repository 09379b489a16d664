"""Layouts that a model cannot have, told from the config."""

import re

import pytest

from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.layout_problems import find_layout_problems

MOE = {"num_layers": 4, "num_moe_experts": 4}


def find(fields, *, is_generating=False, is_trained=False, **layout):
    return find_layout_problems(
        fields, ParallelLayout(**layout), is_generating=is_generating, is_trained=is_trained
    )


def test_a_model_that_fits_has_no_problem():
    assert find({**MOE, "sequence_parallel": True}, is_trained=True, tp_size=2, pp_size=2) == ()
    assert find({}, is_trained=True) == ()


def test_generation_has_no_virtual_stages():
    [problem] = find({"num_layers": 4}, is_generating=True, pp_size=2, vpp_size=2)
    assert "has no virtual stages" in problem
    assert find({"num_layers": 4}, is_trained=True, pp_size=2, vpp_size=2) == ()


def test_training_experts_over_tensor_ranks_needs_sequence_parallelism():
    [problem] = find(MOE, is_trained=True, tp_size=2)
    assert "tensor_model_parallel_size=2 needs sequence_parallel: true" in problem
    assert find(MOE, is_generating=True, tp_size=2) == ()


def test_experts_cut_otherwise_than_the_model_need_expert_parallelism():
    fields = {**MOE, "sequence_parallel": True}
    [problem] = find(fields, is_trained=True, tp_size=2, etp_size=1)
    assert "trained right only with expert_model_parallel_size > 1" in problem
    assert find(fields, is_trained=True, tp_size=2, etp_size=1, ep_size=2) == ()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_layers_in_first_pipeline_stage": 5}, r"would have \[5, -1\] layers, 4 in all"),
        ({"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 1}, "2 in"),
        ({"account_for_embedding_in_pipeline_split": True}, "5 layers cannot be spread evenly"),
        ({"pipeline_model_parallel_layout": "Et|ttt|L"}, "has 3 chunks; PP x VPP is 2 x 1"),
    ],
)
def test_stages_that_do_not_add_up_are_named(fields, words):
    [problem] = find({"num_layers": 4, **fields}, pp_size=2)
    assert re.search(words, problem)
