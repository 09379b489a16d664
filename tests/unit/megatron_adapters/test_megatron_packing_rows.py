"""Packing refuses rows that no model can score, and cuts rows by their tokens."""

import pytest
import torch

from chatlearn.errors import DataError
from megatron_adapters.batches import Rows
from megatron_adapters.packing import PackingOptions, pack_micro_batches


def make_rows(*lengths):
    """Rows of (prompt, response) lengths with tokens that count up."""
    tokens = iter(range(10_000))
    draw = [[torch.tensor([next(tokens) for _ in range(n)]) for n in pair] for pair in lengths]
    return Rows([prompt for prompt, _ in draw], [response for _, response in draw])


def test_an_empty_prompt_is_refused():
    with pytest.raises(DataError, match="a row has an empty prompt"):
        pack_micro_batches([make_rows((3, 2), (0, 2))], PackingOptions(max_length=8))


def test_a_row_longer_than_the_context_is_refused():
    with pytest.raises(DataError, match="a row has 9 tokens, more than max_sequence_length=8"):
        pack_micro_batches([make_rows((3, 6))], PackingOptions(max_length=8))


def test_a_stream_holds_every_token_but_the_last_responses():
    (batch,) = pack_micro_batches([make_rows((3, 2), (1, 4))], PackingOptions(max_length=8))
    assert batch.token_ids.tolist() == [[0, 1, 2, 3, 5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.reads.tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.targets.tolist() == [3, 4, 6, 7, 8, 9]
    assert batch.mask.tolist() == [[True, True, False, False], [True] * 4]


def test_samples_of_a_prompt_share_its_tokens():
    rows = make_rows((4, 2), (4, 3))
    rows = Rows([rows.prompts[0]] * 2, rows.responses)
    (batch,) = pack_micro_batches([rows], PackingOptions(max_length=8))
    assert batch.num_stream_tokens == 4 + 1 + 2
    assert batch.reads.tolist() == [3, 4, 3, 5, 6]


def test_responses_of_no_token_are_read_nowhere():
    (batch,) = pack_micro_batches([make_rows((3, 0), (2, 1))], PackingOptions(max_length=8))
    assert batch.reads.tolist() == [4]
    assert batch.split(batch.align([torch.empty(0), torch.ones(1)]))[1].tolist() == [1.0]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 16), (16, 16), (17, 32), (500, 512), (1025, 1088), (2100, 2176)]
)
def test_streams_of_few_lengths_are_filled_up(tokens, expected):
    options = PackingOptions(max_length=4096, has_few_lengths=True)
    (batch,) = pack_micro_batches([make_rows((tokens, 1))], options)
    assert batch.token_ids.shape == (1, expected)
    assert int(batch.is_fill.sum()) == expected - tokens
    assert batch.reads.tolist() == [tokens - 1]


def test_few_lengths_heed_the_multiple_of_the_layout():
    options = PackingOptions(max_length=64, has_few_lengths=True, multiple=3)
    (batch,) = pack_micro_batches([make_rows((15, 3))], options)
    assert batch.num_stream_tokens == 33
