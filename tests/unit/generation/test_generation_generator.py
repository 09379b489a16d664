"""The generator over a small causal torch model."""

import pytest
import torch

from chatlearn.algorithms.metrics import token_logprobs
from chatlearn.data.rows import RowId
from chatlearn.errors import DataError
from chatlearn.generation.generator import GenerationRequest, Generator
from chatlearn.generation.sampling import SamplingParams
from chatlearn.generation.torch_runner import TorchModelRunner

VOCAB = 11


class CausalModel(torch.nn.Module):
    """Logits of a position depend on all tokens up to it, and on where they stand."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCAB, 16, generator=generator)
        self.head = torch.randn(16, VOCAB, generator=generator)

    def forward(self, token_ids):
        steps = torch.arange(1, token_ids.shape[1] + 1)[:, None]
        hidden = self.embedding[token_ids].cumsum(1) / steps.sqrt()
        return hidden.tanh() @ self.head


class RecordingRunner(TorchModelRunner):
    """Also notes each pass: slot, start and tokens of its chunks, and how many rows decode."""

    def __init__(self, *args):
        super().__init__(*args)
        self.passes = []

    def forward(self, chunks, rows):
        seen = [(chunk.slot, chunk.start, len(chunk.token_ids)) for chunk in chunks]
        self.passes.append((seen, 0 if rows is None else len(rows.token_ids)))
        if rows is not None:
            assert rows.longest == int(rows.positions.max()) + 1
            assert rows.is_even == (len(rows.positions.unique()) == 1)
        return super().forward(chunks, rows)

    @property
    def num_prefills(self):
        return sum(start == 0 for chunks, _ in self.passes for _, start, _ in chunks)


class Countdown(torch.nn.Module):
    """The next token is one less than the last one, at least 0."""

    def forward(self, token_ids):
        return 50.0 * torch.nn.functional.one_hot((token_ids - 1).clamp(min=0), VOCAB).float()


def request(prompt, tokens, sample=0):
    return GenerationRequest(RowId(prompt, sample), torch.tensor(tokens))


def generator(model, *, slots=4, max_length=16, new=8, stop=(0,), seed=3, **options):
    runner = RecordingRunner(model, VOCAB, slots, max_length)
    made = Generator(runner, SamplingParams(), stop, new, seed, **options)
    return made, runner


REQUESTS = [
    request(prompt, tokens, sample)
    for prompt, tokens in enumerate([[1], [2, 3, 4], [5, 6], [7, 8, 9, 10], [3]])
    for sample in (0, 1)
]


def tokens_by_row(results):
    return {result.row_id: result.token_ids.tolist() for result in results}


def test_a_response_ends_with_the_stop_token():
    made, _ = generator(Countdown())
    (result,) = made.generate([request(0, [9, 4])])
    assert result.token_ids.tolist() == [3, 2, 1, 0]
    assert result.finish_reason == "stop"
    assert result.token_ids.dtype == torch.int64
    assert result.logprobs.tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_a_response_is_cut_at_the_longest_response_and_at_the_models_context():
    made, _ = generator(Countdown(), new=2)
    (result,) = made.generate([request(0, [9])])
    assert (result.token_ids.tolist(), result.finish_reason) == ([8, 7], "length")
    made, _ = generator(Countdown(), max_length=4)
    (result,) = made.generate([request(0, [1, 1, 9])])
    assert (result.token_ids.tolist(), result.finish_reason) == ([8], "length")


def test_several_stop_tokens():
    made, _ = generator(Countdown(), stop=(0, 5))
    results = made.generate([request(0, [8]), request(1, [3])])
    assert [r.token_ids.tolist() for r in results] == [[7, 6, 5], [2, 1, 0]]


def test_logprobs_equal_those_of_a_full_forward():
    model = CausalModel()
    made, _ = generator(model, slots=3)
    for asked, result in zip(REQUESTS, made.generate(REQUESTS), strict=True):
        whole = torch.cat([asked.prompt_token_ids, result.token_ids])[None]
        found = token_logprobs(model(whole)[:, :-1], whole[:, 1:])[0]
        expected = found[len(asked.prompt_token_ids) - 1 :]
        torch.testing.assert_close(result.logprobs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 2, 3, 32])
def test_tokens_do_not_depend_on_slots_or_company(slots):
    expected = tokens_by_row(generator(CausalModel(), slots=4)[0].generate(REQUESTS))
    made, _ = generator(CausalModel(), slots=slots)
    found = tokens_by_row(made.generate(REQUESTS[:3])) | tokens_by_row(
        made.generate(REQUESTS[:2:-1])
    )
    assert found == expected
    assert len({len(tokens) for tokens in expected.values()}) > 1


def test_samples_of_one_prompt_and_other_seeds_differ():
    made, _ = generator(CausalModel(), stop=())
    found = tokens_by_row(made.generate(REQUESTS))
    assert found[RowId(0, 0)] != found[RowId(0, 1)]
    other, _ = generator(CausalModel(), stop=(), seed=4)
    assert tokens_by_row(other.generate(REQUESTS)) != found


def test_results_come_in_the_order_of_the_requests():
    made, _ = generator(CausalModel(), slots=2)
    shuffled = [REQUESTS[at] for at in (4, 0, 9, 3, 1)]
    assert [r.row_id for r in made.generate(shuffled)] == [r.row_id for r in shuffled]
    assert made.generate([]) == []


def test_a_waiting_sequence_takes_a_free_slot_at_once():
    made, runner = generator(Countdown(), slots=2)
    made.generate([request(0, [2]), request(1, [4]), request(2, [3])])
    # The first row is done after two tokens; the second moves to its slot, the third behind it.
    assert runner.passes == [
        ([(0, 0, 1), (1, 0, 1)], 0),
        ([], 2),
        ([(1, 0, 1)], 1),
        ([], 2),
        ([], 1),
    ]


@pytest.mark.parametrize("slots", [1, 2, 3, 16])
@pytest.mark.parametrize("in_waves", [False, True])
def test_a_prompt_goes_through_the_model_once_for_all_its_samples(slots, in_waves):
    made, runner = generator(CausalModel(), slots=slots, is_deterministic=in_waves)
    made.generate(REQUESTS)
    assert runner.num_prefills == 5


def test_equal_prompt_numbers_with_other_tokens_share_nothing():
    made, runner = generator(Countdown())
    results = made.generate([request(0, [3]), request(0, [5], sample=1), request(1, [3])])
    assert runner.num_prefills == 3
    assert [len(result.token_ids) for result in results] == [3, 5, 3]


def test_a_long_prompt_goes_in_chunks_while_others_decode():
    made, runner = generator(Countdown(), slots=2, prefill_chunk_tokens=3)
    made.generate([request(0, [9]), request(1, [1] * 6 + [3])])
    assert runner.passes[:4] == [
        ([(0, 0, 1), (1, 0, 2)], 0),
        ([(1, 2, 3)], 1),
        ([(1, 5, 2)], 1),
        ([], 2),
    ]


def test_a_part_of_a_prompt_moves_down_when_others_leave():
    made, runner = generator(CausalModel(), slots=3, prefill_chunk_tokens=2, new=3, stop=())
    asked = [request(0, [5]), request(1, [6]), request(2, list(range(1, 10)))]
    results = tokens_by_row(made.generate(asked))
    assert [chunks[0][0] for chunks, _ in runner.passes if chunks] == [0, 2, 2, 0, 0, 0]
    assert results == tokens_by_row(generator(CausalModel(), new=3, stop=())[0].generate(asked))


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3])
def test_tokens_do_not_depend_on_chunks(chunk_tokens):
    expected = tokens_by_row(generator(CausalModel())[0].generate(REQUESTS))
    made, _ = generator(CausalModel(), slots=3, prefill_chunk_tokens=chunk_tokens)
    assert tokens_by_row(made.generate(REQUESTS)) == expected


def test_random_numbers_go_on_beyond_one_table_of_them():
    made, _ = generator(CausalModel(), max_length=100, new=90, stop=())
    alone = tokens_by_row(made.generate(REQUESTS[:1]))
    assert alone.items() <= tokens_by_row(made.generate(REQUESTS)).items()
    tokens = alone[RowId(0, 0)]
    assert len(tokens) == 90
    assert tokens[:32] != tokens[32:64]


def test_deterministic_mode_goes_in_waves_of_row_order():
    waves = []
    for order in (REQUESTS, REQUESTS[::-1]):
        made, runner = generator(CausalModel(), slots=3, is_deterministic=True)
        results = made.generate(order)
        waves.append((runner.passes, tokens_by_row(results)))
    assert waves[0] == waves[1]
    prefills = [[slot for slot, _, _ in chunks] for chunks, _ in waves[0][0] if chunks]
    # Each second wave begins with a sample whose prompt went through the model before.
    assert prefills == [[0, 2], [1], [0, 2]]


def test_in_deterministic_mode_a_prompt_is_cut_at_places_of_its_own():
    lengths = {0: 2, 1: 7, 2: 3, 3: 1}
    asked = [request(prompt, [1 + prompt] * length) for prompt, length in lengths.items()]
    options = {"prefill_chunk_tokens": 3, "stop": (), "is_deterministic": True}
    made, runner = generator(CausalModel(), **options)
    made.generate(asked)
    cuts = {slot: [] for slot in lengths}
    for chunks, _ in runner.passes:
        assert sum(tokens for _, _, tokens in chunks) <= 3
        for slot, start, tokens in chunks:
            cuts[slot].append((start, tokens))
    assert cuts == {0: [(0, 2)], 1: [(0, 3), (3, 3), (6, 1)], 2: [(0, 3)], 3: [(0, 1)]}


@pytest.mark.parametrize("tokens", [[], [1, 2, 3, 4]])
def test_a_prompt_without_room_names_its_row(tokens):
    made, _ = generator(Countdown(), max_length=4)
    message = f"row 7.1: the prompt has {len(tokens)} tokens; it needs at least 1 and at most 3"
    with pytest.raises(DataError, match=message):
        made.generate([request(0, [1]), request(7, tokens, sample=1)])


def test_a_runner_of_one_rank_needs_the_sampled_tokens():
    with pytest.raises(ValueError, match="samples all 2 tokens itself"):
        TorchModelRunner(Countdown(), VOCAB, 2, 4).exchange_tokens(None, None, 2)


@pytest.mark.parametrize("slots", [1, 2, 3, 32])
@pytest.mark.parametrize("in_waves", [False, True])
@pytest.mark.parametrize("new", [1, 2, 8, 13])
def test_looking_ahead_changes_no_response(slots, in_waves, new):
    options = {"new": new, "max_length": 13, "is_deterministic": in_waves}
    plain, _ = generator(CausalModel(), slots=4, **options)
    ahead, runner = generator(CausalModel(), slots=slots, looks_ahead=True, **options)
    for asked in (REQUESTS, REQUESTS[::-1], REQUESTS[2:5]):
        wanted, found = plain.generate(asked), ahead.generate(asked)
        assert tokens_by_row(found) == tokens_by_row(wanted)
        assert [r.finish_reason for r in found] == [r.finish_reason for r in wanted]
        for one, other in zip(wanted, found, strict=True):
            torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
    assert all(count <= slots for _, count in runner.passes)
