"""Decoding by CUDA graphs says what decoding without them says; skipped where there is no GPU."""

import generation_cases as cases
import megatron_cases
import pytest

from chatlearn.data.rows import RowId

pytestmark = pytest.mark.gpu
SAMPLING = {"max_new_tokens": 9, "stop_token_ids": [5]}


@pytest.mark.parametrize("num_slots", [None, 3])
def test_graphs_sample_what_plain_passes_sample(cuda_world, num_slots):
    fields = {"num_query_groups": 2, "generation": {**SAMPLING, "num_slots": num_slots}}
    module = megatron_cases.build_module(0, "policy", fields, device=cuda_world)
    prompts = [row["prompt_token_ids"] for row in megatron_cases.make_rows(6, seed=3)]
    ids = [RowId(number, sample) for number in range(6) for sample in range(3)]
    if module._runner.graphs is None:
        pytest.skip("Transformer Engine's layers go through Megatron's modules")
    tokens, logprobs = cases.respond(module, prompts, ids)
    assert (tokens, logprobs) == cases.respond(module, prompts, ids)
    module._runner.graphs = None
    plain_tokens, plain_logprobs = cases.respond(module, prompts, ids)
    assert tokens == plain_tokens
    for found, wanted in zip(logprobs, plain_logprobs, strict=True):
        assert found == pytest.approx(wanted, abs=1e-3)
