"""Packed streams and shared prompts give what each row gives by itself."""

import megatron_cases as cases
import pytest
import torch

TP2_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
WINDOW = {"window_size": [3, 0], "window_attn_skip_freq": 2}
ONE, ALL = 1, 12


@pytest.mark.parametrize("kind", ["sft", "ppo", "value"])
def test_rows_that_share_a_prompt_train_as_if_apart(ranks, kind):
    apart = ranks.run(1, cases.train_groups, {}, ONE, kind)[0]
    together = ranks.run(1, cases.train_groups, {}, ALL, kind)[0]
    assert together[0] == pytest.approx(apart[0], rel=1e-5, abs=1e-6)
    assert together[1] == pytest.approx(apart[1], rel=1e-5)
    assert (together[2] - apart[2]).abs().max() <= 1e-5 * apart[2].abs().max()
    # The three prompts of 4, 7 and 10 tokens are there once, not four times.
    assert apart[3] - together[3] == 3 * (4 + 7 + 10)


@pytest.mark.parametrize(
    ("world_size", "fields"),
    [
        (2, TP2_SP),
        (2, PP2),
        (2, CP2),
        (2, {}),
        (4, {**CP2, **TP2_SP}),
        (1, WINDOW),
        (2, {**CP2, **WINDOW}),
    ],
    ids=["tp2-sp", "pp2", "cp2", "dp2", "cp2-tp2-sp", "window", "cp2-window"],
)
def test_shared_prompts_train_the_same_in_every_layout(ranks, world_size, fields):
    alone = {key: value for key, value in fields.items() if key in WINDOW}
    expected = ranks.run(1, cases.train_groups, alone, ONE)[0]
    for found in ranks.run(world_size, cases.train_groups, fields, ALL):
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-5)


def test_a_window_shows(ranks):
    narrow = ranks.run(1, cases.train_groups, WINDOW, ONE)[0]
    assert narrow[0] != pytest.approx(ranks.run(1, cases.train_groups, {}, ONE)[0][0], rel=1e-3)


@pytest.mark.parametrize("kind", ["reference", "critic", "reward"])
@pytest.mark.parametrize(("world_size", "fields"), [(1, {}), (2, PP2), (2, CP2), (2, TP2_SP)])
def test_rows_are_scored_together_as_alone(ranks, kind, world_size, fields):
    found = ranks.run(world_size, cases.score_groups, fields, kind)[-1]
    for together, alone in found:
        assert together == pytest.approx(alone, abs=1e-5)
    if kind == "reference":
        assert len({len(together) for together, _ in found}) > 3


def test_dropout_keeps_prompts_apart(ranks):
    num_tokens = ranks.run(1, cases.train_groups, {"hidden_dropout": 0.1}, ALL)[0][3]
    rows = cases.make_groups()
    assert num_tokens == sum(sum(map(len, row.values())) - 1 for row in rows)


def test_a_token_budget_holds_whether_a_model_shares_prompts_or_not(ranks):
    shared = ranks.run(1, cases.pack_within, {}, 40)[0]
    apart = ranks.run(1, cases.pack_within, {"hidden_dropout": 0.1}, 40)[0]
    assert max(*shared, *apart) <= 40
    assert len(shared) < len(apart)


EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_aux_loss_coeff": 2.0,
    "moe_router_load_balancing_type": "aux_loss",
}


@pytest.mark.parametrize("kind", ["reference", "critic", "reward"])
def test_a_model_with_experts_shares_prompts_in_scoring_with_equal_scores(ranks, kind):
    assert ranks.run(1, cases.shares_prompts, EXPERTS, kind) == [True]
    found = ranks.run(1, cases.score_groups, EXPERTS, kind)[0]
    for together, alone in found:
        assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "kind", "expected"),
    [
        (EXPERTS, "trainer", False),
        ({**EXPERTS, "moe_router_load_balancing_type": "none"}, "trainer", True),
        (
            {**EXPERTS, "moe_router_load_balancing_type": "none", "moe_z_loss_coeff": 0.1},
            "trainer",
            False,
        ),
        ({**EXPERTS, "moe_expert_capacity_factor": 1.0}, "reference", False),
        ({"hidden_dropout": 0.1}, "reference", True),
    ],
)
def test_prompts_are_shared_where_nothing_counts_tokens(ranks, fields, kind, expected):
    assert ranks.run(1, cases.shares_prompts, fields, kind) == [expected]


def test_large_logits_are_made_in_chunks_with_the_same_result(ranks):
    whole = ranks.run(1, cases.train_groups, {}, ALL)[0]
    chunked = ranks.run(1, cases.train_in_logit_chunks, {}, ALL)[0]
    assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
    assert torch.allclose(chunked[2], whole[2], atol=1e-6)
