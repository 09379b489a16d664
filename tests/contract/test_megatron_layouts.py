"""One batch gives one loss and one gradient norm, however the model is cut."""

import megatron_cases as cases
import pytest
from long_forms import only

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = {**PP2, "virtual_pipeline_model_parallel_size": 2}
SP = {**TP2, "sequence_parallel": True}
DISTRIBUTED = {"use_distributed_optimizer": True}
RECOMPUTE = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
CP2 = {"context_parallel_size": 2}
TIED = {"untie_embeddings_and_output_weights": False}
LAYOUTS = {
    "tp2": (2, TP2),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, VPP2),
    "pp4": (4, {"pipeline_model_parallel_size": 4}),
    "dp2": (2, {}),
    "dp2-distributed-optimizer": (2, DISTRIBUTED),
    "dp2-overlapped-reduction": (2, {**DISTRIBUTED, "overlap_grad_reduce": True}),
    "pp2-vpp2-dp2-overlapped": (4, {**VPP2, "overlap_grad_reduce": True}),
    "tp2-sp": (2, SP),
    "tp2-pp2": (4, {**TP2, **PP2}),
    "tp2-pp2-sp": (4, {**SP, **PP2}),
    "tp2-dp2-distributed-optimizer": (4, {**TP2, **DISTRIBUTED}),
    "pp2-vpp2-dp2": (4, VPP2),
    "cp2": (2, CP2),
    "cp2-tp2-sp": (4, {**CP2, **SP}),
    "cp2-pp2": (4, {**CP2, **PP2}),
    "cp2-dp2-distributed-optimizer": (4, {**CP2, **DISTRIBUTED}),
    "recompute": (1, RECOMPUTE),
    "tp2-recompute": (2, {**TP2, **RECOMPUTE}),
}
BF16_LAYOUTS = ["tp2", "pp2", "pp2-vpp2", "dp2-distributed-optimizer", "tp2-sp"]


@pytest.fixture(scope="module")
def expected(ranks):
    return ranks.run(1, cases.train_supervised, {})[0]


SHORT = (
    *("tp2", "tp4", "pp2", "pp2-vpp2", "dp2-distributed-optimizer", "tp2-sp", "tp2-pp2-sp"),
    *("pp2-vpp2-dp2-overlapped", "cp2-tp2-sp", "recompute"),
)


@pytest.mark.parametrize("name", only(SHORT, LAYOUTS))
def test_loss_and_gradient_norm_are_those_of_one_rank(ranks, expected, name):
    world_size, fields = LAYOUTS[name]
    for first, second in ranks.run(world_size, cases.train_supervised, fields):
        assert first == pytest.approx(expected[0], rel=1e-5)
        # Adam's first step is close to a sign: it magnifies the rounding of tiny gradients.
        assert second == pytest.approx(expected[1], rel=1e-4)


@pytest.mark.parametrize("name", ["tp2", "pp2", "tp2-pp2"])
def test_tied_embeddings_are_the_same_in_every_layout(ranks, name):
    reference = ranks.run(1, cases.train_supervised, TIED)[0]
    world_size, fields = LAYOUTS[name]
    for steps in ranks.run(world_size, cases.train_supervised, {**fields, **TIED}):
        assert steps == [pytest.approx(step, rel=1e-5) for step in reference]


@pytest.mark.parametrize("name", BF16_LAYOUTS)
def test_bf16_agrees_to_a_hundredth(ranks, name):
    reference = ranks.run(1, cases.train_supervised, {"bf16": True}, 1)[0]
    world_size, fields = LAYOUTS[name]
    for steps in ranks.run(world_size, cases.train_supervised, {**fields, "bf16": True}, 1):
        assert steps == [pytest.approx(step, rel=1e-2) for step in reference]


def test_the_loss_does_not_depend_on_the_micro_batches(ranks, expected):
    """Megatron divides a reported loss in place by the number of micro-batches."""
    steps = ranks.run(1, cases.train_supervised, {}, 2, 7)[0]
    assert steps == [pytest.approx(step, rel=1e-5) for step in expected]


MOE = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 32,
    "moe_aux_loss_coeff": 0.0,
    "moe_router_load_balancing_type": "none",
}


EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize("fields", [EP2, PP2, {**SP, **EP2, "expert_tensor_parallel_size": 1}])
def test_experts_are_the_same_in_every_layout(ranks, fields):
    reference = ranks.run(1, cases.train_supervised, MOE)[0]
    for steps in ranks.run(2, cases.train_supervised, {**fields, **MOE}):
        assert steps[0] == pytest.approx(reference[0], rel=1e-5)


BALANCED = {
    **MOE,
    "moe_aux_loss_coeff": 2.0,
    "moe_z_loss_coeff": 0.5,
    "moe_router_load_balancing_type": "aux_loss",
}
BIASED = {**MOE, "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
SP_EP = {**SP, **EP2, "expert_tensor_parallel_size": 1}


@pytest.mark.parametrize("name", ["aux_loss", "global_aux_loss", "selection bias"])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(VPP2, id="vpp2"),
        pytest.param(SP_EP, id="sp-ep2"),
        pytest.param(PP2, id="pp2", marks=pytest.mark.long),
        pytest.param(CP2, id="cp2", marks=pytest.mark.long),
        pytest.param({**PP2, **RECOMPUTE}, id="pp2-recompute", marks=pytest.mark.long),
    ],
)
def test_only_tokens_of_rows_count_for_the_balance_of_experts(ranks, fields, name):
    """Streams are filled up to a multiple or to one length, and virtual stages get fill batches."""
    kind = {**BALANCED, "moe_router_load_balancing_type": name}
    kind = BIASED if name == "selection bias" else kind
    (steps, biases), *_ = ranks.run(1, cases.train_balanced, kind, 3)
    assert bool(biases) is (name == "selection bias")
    found = {}
    for own_steps, own_biases in ranks.run(2, cases.train_balanced, {**fields, **kind}, 3):
        assert own_steps == [pytest.approx(step, rel=1e-5) for step in steps]
        found |= own_biases
    assert found == biases


DENSE_AND_SPARSE = [1, 0, 0, 1]
UNEVEN = {**PP2, "num_layers_in_first_pipeline_stage": 1}


@pytest.mark.parametrize("fields", [{}, PP2, VPP2, UNEVEN], ids=["pp1", "pp2", "vpp2", "uneven"])
@pytest.mark.parametrize("frequency", [3, DENSE_AND_SPARSE], ids=["number", "list"])
def test_layers_have_experts_by_their_number_in_the_whole_model(ranks, fields, frequency):
    fields = {**fields, **MOE, "moe_layer_freq": frequency}
    world_size = fields.get("pipeline_model_parallel_size", 1)
    found = {}
    for own in ranks.run(world_size, cases.layer_kinds, fields):
        found.update(own)
    assert found == {1: "MoELayer", 2: "MLP", 3: "MLP", 4: "MoELayer"}


@pytest.mark.parametrize("fields", [PP2, VPP2, UNEVEN], ids=["pp2", "vpp2", "uneven"])
def test_dense_and_expert_layers_are_the_same_in_every_layout(ranks, fields):
    mixed = {**MOE, "moe_layer_freq": DENSE_AND_SPARSE}
    reference = ranks.run(1, cases.train_supervised, mixed)[0]
    for steps in ranks.run(2, cases.train_supervised, {**fields, **mixed}):
        assert steps[0] == pytest.approx(reference[0], rel=1e-5)


@pytest.mark.parametrize(
    "name",
    only(("pp2-vpp2", "dp2", "tp2-pp2"), ["tp2", "pp2", "pp2-vpp2", "dp2", "tp2-sp", "tp2-pp2"]),
)
@pytest.mark.parametrize("kind", ["trainer", "value"])
def test_ppo_does_not_depend_on_the_layout(ranks, name, kind):
    reference = ranks.run(1, cases.train_ppo, {}, kind)[0]
    world_size, fields = LAYOUTS[name]
    for steps in ranks.run(world_size, cases.train_ppo, fields, kind):
        for step, wanted in zip(steps, reference, strict=True):
            assert step == pytest.approx(wanted, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["recompute", "tp2", "pp2", "pp2-vpp2", "dp2"])
def test_the_first_update_after_a_rollout_has_a_ratio_of_one(ranks, name):
    world_size, fields = LAYOUTS[name]
    first, second = ranks.run(world_size, cases.train_ppo, fields)[0]
    assert (first["ratio_gap"], first["update_kl"]) == (0.0, 0.0)
    assert second["ratio_gap"] > 0.0
    assert second["update_kl"] > 1e-8


def test_a_decaying_rate_needs_no_minimum(ranks):
    fields = {"lr_decay_style": "cosine", "lr_decay_steps": 4}
    steps = ranks.run(1, cases.train_supervised, fields, 3)[0]
    assert steps[2][0] < steps[0][0]
