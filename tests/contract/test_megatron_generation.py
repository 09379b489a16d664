"""Generation with a cache says the same as a full forward, in every layout and company."""

import megatron_cases as cases
import pytest

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS = {"one": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2), "tp2-pp2": (4, {**TP2, **PP2})}
SAMPLING = {"temperature": 0.8, "max_new_tokens": 9, "num_slots": 8, "stop_token_ids": [5]}
# A row's sums may be taken in another order in a longer batch or for a longer prefix: single
# outputs differ by one bf16 step, which was seen to move a log-probability by 9e-3.
BF16_BOUND = 2e-2


def make_prompts(count=6):
    return [row["prompt_token_ids"] for row in cases.make_rows(count, seed=3)]


def generate(ranks, name, **changes):
    world_size, fields = LAYOUTS[name]
    options = {**SAMPLING, **changes.pop("generation", {})}
    every = ranks.run(
        world_size, cases.generate, {**fields, **changes, "generation": options}, make_prompts()
    )
    assert all(tokens == every[0][0] for tokens, _ in every)
    return every[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_reported_logprobs_are_those_of_a_full_forward(ranks, name):
    tokens, logprobs = generate(ranks, name, generation={"temperature": 1.0})
    full = ranks.run(1, cases.score, {}, cases.rows_of(make_prompts(), tokens))[0]
    for reported, scored in zip(logprobs, full, strict=True):
        assert reported == pytest.approx(scored, abs=1e-4)


def score(ranks, name, fields, tokens):
    """Log-probabilities of a full forward, from a rank of the last stage."""
    world_size, layout = LAYOUTS[name]
    rows = cases.rows_of(make_prompts(), tokens)
    return ranks.run(world_size, cases.score, {**layout, **fields}, rows)[-1]


@pytest.mark.parametrize("name", LAYOUTS)
def test_in_bf16_they_are_those_of_a_full_forward_in_the_same_layout(ranks, name):
    tokens, logprobs = generate(ranks, name, bf16=True, generation={"temperature": 1.0})
    for reported, scored in zip(logprobs, score(ranks, name, {"bf16": True}, tokens), strict=True):
        assert reported == pytest.approx(scored, abs=BF16_BOUND)


def test_stages_of_different_kinds_agree_on_the_rows_of_a_pass(ranks):
    """A processor with bf16 fills batches up, but not with experts, which one stage has."""
    # Each token goes to all experts: a rounding cannot change which.
    experts = {"num_moe_experts": 4, "moe_router_topk": 4, "moe_router_load_balancing_type": "none"}
    fields = {**experts, "moe_layer_freq": [0, 0, 1, 1], "bf16": True}
    tokens, logprobs = generate(ranks, "pp2", **fields, generation={"temperature": 1.0})
    for reported, scored in zip(logprobs, score(ranks, "pp2", fields, tokens), strict=True):
        assert reported == pytest.approx(scored, abs=BF16_BOUND)


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_in_bf16_they_are_those_of_another_layout_to_its_rounding(ranks, name):
    """Tensor-parallel ranks add partial sums that are rounded to bf16."""
    tokens, logprobs = generate(ranks, name, bf16=True, generation={"temperature": 1.0})
    for reported, scored in zip(logprobs, score(ranks, "one", {"bf16": True}, tokens), strict=True):
        assert reported == pytest.approx(scored, abs=2e-2)


@pytest.mark.parametrize("name", ["tp2", "pp2", "tp2-pp2"])
def test_every_layout_samples_the_same_tokens(ranks, name):
    tokens, logprobs = generate(ranks, name)
    expected_tokens, expected_logprobs = generate(ranks, "one")
    assert tokens == expected_tokens
    for found, wanted in zip(logprobs, expected_logprobs, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_row_does_not_depend_on_its_company(ranks, num_slots):
    crowded, crowded_logprobs = generate(ranks, "one")
    narrow, narrow_logprobs = generate(ranks, "one", generation={"num_slots": num_slots})
    assert narrow == crowded
    for found, wanted in zip(narrow_logprobs, crowded_logprobs, strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_row_does_not_depend_on_its_company_in_bf16_but_for_rounding(ranks, num_slots):
    """A number at the edge between two tokens may fall to either: then they are neighbours."""
    narrow = generate(ranks, "one", bf16=True, generation={"num_slots": num_slots})
    crowded = generate(ranks, "one", bf16=True)
    forks = []
    for ids, logprobs, other_ids, other_logprobs in zip(*narrow, *crowded, strict=True):
        pairs = list(zip(ids, other_ids, strict=False))
        same = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
        assert logprobs[:same] == pytest.approx(other_logprobs[:same], abs=2e-2)
        forks += [abs(one - other) for one, other in pairs[same : same + 1]]
    assert forks in ([], [1])


def test_positions_show_in_the_logprobs(ranks):
    """Else a cache that forgets them would pass the tests above."""
    tokens, logprobs = generate(ranks, "one", generation={"temperature": 1.0})
    without = {"position_embedding_type": "none"}
    gaps = [
        abs(reported - scored)
        for row, other in zip(logprobs, score(ranks, "one", without, tokens), strict=True)
        for reported, scored in zip(row, other, strict=True)
    ]
    assert max(gaps) > 0.1


def test_responses_end_at_a_stop_token_or_at_the_limit(ranks):
    tokens, _ = generate(ranks, "one")
    assert all(ids[-1] == 5 or len(ids) == 9 for ids in tokens)
    assert all(5 not in ids[:-1] for ids in tokens)


def test_a_policy_with_sequence_parallelism_generates_the_same(ranks):
    tokens, _ = generate(ranks, "tp2", sequence_parallel=True)
    assert tokens == generate(ranks, "one")[0]


def test_a_policy_with_virtual_stages_is_refused_by_name(ranks):
    with pytest.raises(AssertionError, match="a model that generates has no virtual stages"):
        generate(ranks, "pp2", virtual_pipeline_model_parallel_size=2)
