"""The same code on one CUDA device; skipped where there is none."""

import megatron_cases as cases
import pytest

pytestmark = pytest.mark.gpu
SAMPLING = {"max_new_tokens": 9, "num_slots": 8, "stop_token_ids": [5]}


def test_training_on_cuda_lowers_the_loss(cuda_world):
    module = cases.build_module(0, "trainer", {}, device=cuda_world)
    data, _ = cases.lane_batches(module, cases.make_rows(7), cases.SFT)
    losses = [module.train_step(data)["loss"] for _ in range(20)]
    assert losses[-1] < losses[0] - 1.0


def test_reported_logprobs_are_those_of_a_full_forward_on_cuda(cuda_world):
    prompts = [row["prompt_token_ids"] for row in cases.make_rows(6, seed=3)]
    fields = {"generation": SAMPLING}
    tokens, logprobs = cases.generate(0, fields, prompts, device=cuda_world)
    rows = cases.rows_of(prompts, tokens)
    for reported, scored in zip(logprobs, cases.score(0, {}, rows, device=cuda_world), strict=True):
        assert reported == pytest.approx(scored, abs=1e-3)
