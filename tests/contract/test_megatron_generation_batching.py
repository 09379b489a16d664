"""What decodes together, in which slots and through which program, does not show in the samples."""

import generation_cases as cases
import pytest
from long_forms import every
from test_megatron_generation import LAYOUTS, SAMPLING, make_prompts

CROWDED = {"num_slots": None, "prefill_chunk_tokens": 2048}
ALONE = {"num_slots": 1}
# Fewer slots than samples, and chunks that cut most prompts.
TIGHT = {"num_slots": 4, "prefill_chunk_tokens": 2}
# Memory for one slot, however large the machine is.
POOR = {"num_slots": None, "kv_cache_memory_share": 1e-9}
GQA = {"num_query_groups": 2}
WINDOWS = {"window_size": [3, 0], "window_attn_skip_freq": [1, 1, 0, 1]}
GEMMA = {
    "sandwich_norms": True,
    "layernorm_zero_centered_gamma": True,
    "swiglu": False,
    "gated_linear_unit": True,
    "activation": "gelu_tanh",
    "rotary_base_local": 100.0,
    "embedding_scale": 2.5,
    "softmax_scale": 0.5,
    "qk_layernorm": True,
}
MODELS = {
    "grouped": GQA,
    "one-group-of-heads": {"num_query_groups": 1},
    "layernorm-gelu-biases": {
        "normalization": "LayerNorm",
        "swiglu": False,
        "add_bias_linear": True,
    },
    "zero-centred-norm": {"layernorm_zero_centered_gamma": True},
    "query-key-norm": {"qk_layernorm": True, **GQA},
    "query-bias": {"add_qkv_bias": True},
    "tied": {"untie_embeddings_and_output_weights": False},
    "learned-positions": {"position_embedding_type": "learned_absolute"},
    "no-positions": {"position_embedding_type": "none"},
    "half-rotary": {"rotary_percent": 0.5},
    "windows": {**WINDOWS, **GQA},
    "norms-on-both-sides": {**WINDOWS, **GEMMA},
    "scaled-positions": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
}
LATENT = {
    "multi_latent_attention": True,
    "num_query_groups": None,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "rope_type": "rope",
    "qk_layernorm": True,
}
EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none"}


def sample(ranks, layout="one", *, fields=None, generation=None, **options):
    world_size, layout_fields = LAYOUTS[layout]
    given = {**SAMPLING, "temperature": 1.0, **CROWDED, **(generation or {})}
    every = ranks.run(
        world_size,
        _sample,
        {**layout_fields, **(fields or {}), "generation": given},
        make_prompts(4),
        options,
    )
    assert all(found == every[0] for found in every)
    return every[0]


def _sample(rank, fields, prompts, options):
    return cases.sample_prompts(rank, fields, prompts, **options)


def assert_alike(found, expected, bound=1e-4):
    assert found[0] == expected[0]
    for one, other in zip(found[1], expected[1], strict=True):
        assert one == pytest.approx(other, abs=bound)


@pytest.mark.parametrize(
    "layout",
    [
        *("one", "tp2-pp2"),
        *(pytest.param(name, marks=pytest.mark.long) for name in ("tp2", "pp2")),
    ],
)
def test_slots_chunks_and_shared_prompts_do_not_show(ranks, layout):
    crowded = sample(ranks, layout, fields=GQA)
    assert_alike(sample(ranks, layout, fields=GQA, generation=TIGHT), crowded)
    for generation in (ALONE, POOR):
        assert_alike(sample(ranks, layout, fields=GQA, generation=generation), crowded)


@pytest.mark.parametrize("generation", [CROWDED, TIGHT])
def test_in_deterministic_mode_the_order_of_rows_does_not_show_at_all(ranks, generation):
    options = {"runtime": {"deterministic": True}}
    one, other = (
        sample(ranks, generation=generation, is_reversed=is_reversed, **options)
        for is_reversed in (False, True)
    )
    assert one == other


@pytest.mark.parametrize("layout", ["one", "tp2-pp2"])
def test_new_weights_count_from_the_next_generation_on(ranks, layout):
    world_size, fields = LAYOUTS[layout]
    given = {**fields, "generation": {**SAMPLING, "temperature": 1.0}}
    before, after, expected = ranks.run(
        world_size, cases.generate_after_change, given, make_prompts()
    )[0]
    assert after == expected
    assert after[0] != before


@pytest.mark.parametrize("name", every(2, MODELS))
def test_the_dense_program_says_what_megatrons_modules_say(ranks, name):
    fields = {"init_method_std": 0.2, **MODELS[name]}
    *dense, kind = sample(ranks, fields=fields, generation=TIGHT)
    *through_modules, other = sample(ranks, fields=fields, through_modules=True)
    assert (kind, other) == ("DenseProgram", "ModuleProgram")
    assert_alike(dense, through_modules, bound=2e-5)


def test_the_dense_program_says_what_megatrons_modules_say_on_four_ranks(ranks):
    fields = {"add_bias_linear": True, "untie_embeddings_and_output_weights": False}
    *dense, kind = sample(ranks, "tp2-pp2", fields=fields)
    *through_modules, _ = sample(ranks, "tp2-pp2", fields=fields, through_modules=True)
    assert kind == "DenseProgram"
    assert_alike(dense, through_modules, bound=2e-5)


def test_batches_that_are_filled_up_for_graphs_say_the_same(ranks):
    """The passes of CUDA graphs, without the graphs."""
    plain = sample(ranks, fields=GQA, generation=TIGHT)
    assert_alike(sample(ranks, fields=GQA, generation=TIGHT, is_filled_up=True), plain)
    assert_alike(sample(ranks, fields=GQA, is_filled_up=True), plain)
    windowed = sample(ranks, fields=WINDOWS, generation=TIGHT)
    assert_alike(sample(ranks, fields=WINDOWS, generation=TIGHT, is_filled_up=True), windowed)


@pytest.mark.parametrize("generation", [CROWDED, TIGHT])
@pytest.mark.parametrize("fields", [WINDOWS, {**WINDOWS, **GEMMA}])
def test_windows_are_those_of_a_full_forward(ranks, fields, generation):
    tokens, logprobs, kind = sample(ranks, fields=fields, generation=generation)
    assert kind == "DenseProgram"
    full = ranks.run(1, cases.score_samples, fields, make_prompts(4), tokens)[0]
    assert_alike((tokens, logprobs), (tokens, full))
    unlike = {**fields, "window_size": [30, 0]}
    other = ranks.run(1, cases.score_samples, unlike, make_prompts(4), tokens)[0]
    assert (
        max(
            abs(a - b)
            for one, two in zip(full, other, strict=True)
            for a, b in zip(one, two, strict=True)
        )
        > 0.01
    )


@pytest.mark.parametrize("layout", ["one", "tp2-pp2"])
def test_latent_attention_generates_through_its_module(ranks, layout):
    tokens, logprobs, kind = sample(ranks, layout, fields=LATENT, generation=TIGHT)
    assert kind == "ModuleProgram"
    full = ranks.run(1, cases.score_samples, LATENT, make_prompts(4), tokens)[0]
    assert_alike((tokens, logprobs), (tokens, full))


def test_experts_generate_through_megatrons_modules(ranks):
    tokens, logprobs, kind = sample(ranks, fields=EXPERTS, generation=TIGHT)
    assert kind == "ModuleProgram"
    full = ranks.run(1, cases.score_samples, EXPERTS, make_prompts(4), tokens)[0]
    assert_alike((tokens, logprobs), (tokens, full))
