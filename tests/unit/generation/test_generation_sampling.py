"""Sampling: one uniform number decides a row's token."""

from math import log

import pytest
import torch

from chatlearn.generation.sampling import SamplingParams, sample_tokens

# Probabilities 0.5, 0.3, 0.2 at temperature 1.
LOGITS = torch.tensor([[log(0.5), log(0.3), log(0.2)]])


def draw(uniform, **params):
    found = sample_tokens(
        LOGITS, SamplingParams(**params), torch.tensor([uniform], dtype=torch.float64)
    )
    return int(found.token_ids[0])


@pytest.mark.parametrize(
    ("uniform", "token"), [(1e-9, 0), (0.49, 0), (0.51, 1), (0.79, 1), (0.81, 2), (1 - 1e-12, 2)]
)
def test_the_number_picks_the_token_by_cumulated_probability(uniform, token):
    assert draw(uniform) == token


@pytest.mark.parametrize("uniform", [1e-9, 0.5, 1 - 1e-12])
def test_temperature_zero_takes_the_likeliest_token(uniform):
    assert draw(uniform, temperature=0.0) == 0


def test_a_low_temperature_sharpens_the_distribution():
    # At 0.5 the probabilities are 25, 9 and 4 of 38.
    assert [draw(u, temperature=0.5) for u in (0.65, 0.67, 0.88, 0.90)] == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 9}, {0, 1, 2}),
        ({"top_p": 0.1}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.85}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.55}, {0}),
    ],
)
def test_truncation_keeps_the_likeliest_tokens(params, kept):
    found = {draw(u, **params) for u in (1e-9, 0.3, 0.55, 0.7, 0.9, 1 - 1e-12)}
    assert found == kept


def test_truncation_follows_the_probabilities_not_the_order_of_tokens():
    params = SamplingParams(top_k=2)
    logits = LOGITS.flip(-1).repeat(3, 1)
    found = sample_tokens(logits, params, torch.tensor([1e-9, 0.37, 0.38], dtype=torch.float64))
    assert found.token_ids.tolist() == [1, 1, 2]


def test_logprobs_are_those_before_truncation_at_the_temperature():
    uniforms = torch.tensor([0.1], dtype=torch.float64)
    truncated = sample_tokens(LOGITS, SamplingParams(top_k=1), uniforms)
    assert truncated.logprobs.item() == pytest.approx(log(0.5))
    cold = sample_tokens(LOGITS, SamplingParams(temperature=0.5), uniforms)
    assert cold.logprobs.item() == pytest.approx(log(25 / 38))
    greedy = sample_tokens(LOGITS, SamplingParams(temperature=0.0), uniforms)
    assert greedy.logprobs.item() == pytest.approx(log(0.5))


def test_a_row_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 50, generator=generator)
    uniforms = torch.rand(8, generator=generator, dtype=torch.float64)
    params = SamplingParams(temperature=0.7, top_p=0.9, top_k=20)
    together = sample_tokens(logits, params, uniforms)
    alone = [sample_tokens(logits[i : i + 1], params, uniforms[i : i + 1]) for i in range(8)]
    assert together.token_ids.tolist() == [int(a.token_ids[0]) for a in alone]


def test_frequencies_follow_the_probabilities():
    count = 3000
    uniforms = (torch.arange(count).double() + 0.5) / count
    found = sample_tokens(LOGITS.repeat(count, 1), SamplingParams(), uniforms)
    assert found.token_ids.bincount().tolist() == [1500, 900, 600]
