"""Which rows are scored together."""

import pytest
import torch

from megatron_adapters.batches import Rows
from megatron_adapters.packing import PackingOptions, pack_micro_batches
from megatron_adapters.parts import split_by_tokens


def make_rows(*groups):
    """Rows of `(prompt length, response lengths)`; each group has one prompt."""
    prompts, responses = [], []
    for number, (prompt, lengths) in enumerate(groups):
        own = torch.full((prompt,), number)
        prompts.extend([own] * len(lengths))
        responses.extend(torch.full((length,), 7) for length in lengths)
    return Rows(prompts, responses)


def computed(cut, shares_prompts=True):
    options = PackingOptions(max_length=100_000, shares_prompts=shares_prompts)
    return sum(batch.num_stream_tokens for batch in pack_micro_batches(cut.parts, options))


def test_parts_have_about_equally_many_tokens():
    rows = make_rows(*[(2, [2 + n % 3]) for n in range(12)])
    parts = split_by_tokens(rows, 20, shares_prompts=False).parts
    assert sum(map(len, parts)) == 12
    assert all(part.num_tokens <= 20 for part in parts)
    assert len(split_by_tokens(rows, 1000, shares_prompts=True, least_parts=4).parts) == 4
    assert len(split_by_tokens(make_rows(), 20, shares_prompts=True).parts) == 1


@pytest.mark.parametrize(
    "groups",
    [
        [(4096, [64] * 8)],
        [(8000, [50] * 16)],
        [(2000, [200] * 8)] * 2,
        [(1000, [30] * 8)] * 4,
        [(512, [100] * 8)] * 8,
    ],
)
@pytest.mark.parametrize("is_mixed", [False, True])
def test_a_prompt_is_computed_once_for_all_its_samples(groups, is_mixed):
    rows = make_rows(*groups)
    if is_mixed:
        rows = rows.select(torch.randperm(len(rows), generator=torch.manual_seed(0)).tolist())
    cut = split_by_tokens(rows, 8192, shares_prompts=True)
    # The last token of a response predicts nothing.
    least = sum(prompt + sum(lengths) - len(lengths) for prompt, lengths in groups)
    assert computed(cut) == least
    assert max(part.num_tokens for part in cut.parts) < sum(map(len, rows.prompts)) + 8192


def test_a_group_that_is_too_long_is_cut_by_its_responses():
    cut = split_by_tokens(make_rows((1000, [900] * 32)), 8192, shares_prompts=True)
    assert [len(part) for part in cut.parts] == [8, 8, 8, 8]


def test_a_pipeline_is_not_filled_at_the_price_of_a_prompt():
    rows = make_rows((400, [10] * 8), (20, [10] * 8))
    assert len(split_by_tokens(rows, 8192, shares_prompts=True, least_parts=4).parts) == 2


def test_without_sharing_every_row_counts_in_full():
    rows = make_rows((1000, [10] * 8))
    cut = split_by_tokens(rows, 2020, shares_prompts=False)
    assert [len(part) for part in cut.parts] == [2] * 4
    assert computed(cut, shares_prompts=False) == 8 * 1009


def test_results_come_back_in_the_order_of_the_rows():
    rows = make_rows((5, [1]), (9, [2]), (5, [3]), (1, [4]))
    rows = Rows([rows.prompts[at] for at in (0, 1, 0, 3)], rows.responses)
    cut = split_by_tokens(rows, 6, shares_prompts=True)
    assert len(cut.positions) > 1
    lengths = [len(response) for part in cut.parts for response in part.responses]
    assert cut.restore(lengths) == [1, 2, 3, 4]
