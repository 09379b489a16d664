"""Attention by a plan is that of the whole mask, for rows, shared prompts, windows and ranks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_adapters.attention import attend
from megatron_adapters.attention_plan import Segment, plan_attention, split_stream

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)
ROWS = st.lists(st.tuples(st.integers(1, 7), LENGTHS), min_size=1, max_size=4)


def build_segments(groups):
    """Each group: a prompt's length and its responses'; one response alone is a whole row."""
    segments, start = [], 0
    for prompt, responses in groups:
        prefix = None
        if len(responses) > 1:
            prefix = Segment(start, prompt)
            segments.append(prefix)
            start += prompt
        for response in responses:
            length = response if prefix else prompt + response
            segments.append(Segment(start, length, prefix))
            start += length
    return segments, start


def whole_mask(segments, num_tokens, window=None):
    """[tokens, tokens] bool, token by token."""
    # Tokens that fill up see themselves, so that no softmax is without a value.
    mask = torch.eye(num_tokens, dtype=torch.bool)
    for segment in segments:
        own = [*range(segment.start, segment.start + segment.length)]
        before = []
        if segment.prefix is not None:
            before = [*range(segment.prefix.start, segment.prefix.start + segment.prefix.length)]
        row = [*before, *own]
        for at, token in enumerate(row):
            if token in own:
                mask[token] = False
                first = 0 if window is None else max(0, at - window)
                mask[token, row[first : at + 1]] = True
    return mask


def draw_heads(num_tokens):
    draw = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, 1, 4, 8), (num_tokens, 1, 2, 8), (num_tokens, 1, 2, 8)]
    return [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes]


def attend_by_mask(query, key, value, mask):
    heads = [t[:, 0].transpose(0, 1).double() for t in (query, key, value)]
    keys, values = (t.repeat_interleave(2, dim=0) for t in heads[1:])
    scores = (heads[0] @ keys.transpose(1, 2)) / 8**0.5
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (weights @ values).transpose(0, 1).reshape(len(query), 1, -1)


def check(groups, *, window=None, num_ranks=1):
    segments, length = build_segments(groups)
    num_tokens = -(-length // (2 * num_ranks)) * 2 * num_ranks
    inputs = draw_heads(num_tokens)
    parts = split_stream(num_tokens, num_ranks)
    query, key, value = inputs
    order = torch.cat(parts)
    outputs = torch.zeros(num_tokens, 1, 32, dtype=torch.float64)
    for rank, part in enumerate(parts):
        plan = plan_attention(
            segments, num_tokens, parts=parts, rank=rank, window=window, dtype=torch.float64
        )
        found = attend(query[part], key[order], value[order], plan, is_windowed=window is not None)
        outputs = outputs.index_copy(0, part, found)
    expected = attend_by_mask(*inputs, whole_mask(segments, num_tokens, window))
    weights = torch.linspace(-1, 1, length * 32, dtype=torch.float64).view(length, 1, 32)
    assert torch.allclose(outputs[:length], expected[:length], atol=1e-10)
    given_gradients = torch.autograd.grad((outputs[:length] * weights).sum(), inputs)
    wanted_gradients = torch.autograd.grad((expected[:length] * weights).sum(), inputs)
    for given_gradient, wanted in zip(given_gradients, wanted_gradients, strict=True):
        assert torch.allclose(given_gradient[:length], wanted[:length], atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_a_plan_attends_as_the_whole_mask_does(groups):
    check(groups)


@settings(max_examples=20, deadline=None)
@given(ROWS, st.integers(0, 6))
def test_a_window_hides_what_lies_further_back(groups, window):
    check(groups, window=window)


@settings(max_examples=20, deadline=None)
@given(ROWS, st.sampled_from([2, 3]))
def test_context_parallel_ranks_attend_together_as_one(groups, num_ranks):
    check(groups, num_ranks=num_ranks)


def test_long_masked_queries_are_cut():
    check([(3, [1100, 700])])


def test_rows_of_one_length_need_neither_copies_nor_masks():
    segments, length = build_segments([(4, [6]), (4, [6]), (4, [6])])
    plan = plan_attention(segments, length)
    assert plan.restore is None
    assert [(b.first, b.batch, b.num_queries, b.mask) for b in plan.blocks] == [(0, 3, 10, None)]


@pytest.mark.parametrize(("lengths", "num_calls"), [([9, 9, 8, 8], 1), ([40, 9, 8], 2)])
def test_rows_of_similar_length_share_a_call(lengths, num_calls):
    segments, length = build_segments([(1, [n]) for n in lengths])
    assert len(plan_attention(segments, length).blocks) == num_calls


def test_every_rank_gets_the_same_work_of_one_long_row():
    segments, length = build_segments([(1, [255])])
    parts = split_stream(length, 4)
    work = [sum(int(token) + 1 for token in part) for part in parts]
    assert max(work) <= 1.01 * min(work)
    assert sorted(torch.cat(parts).tolist()) == list(range(length))
    assert segments[0].stop == length
