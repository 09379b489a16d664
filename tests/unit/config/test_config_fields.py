import pytest

from chatlearn.config import load_config
from chatlearn.config.megatron_fields import MEGATRON_FIELDS
from chatlearn.config.refused_fields import REFUSED_FIELDS, REFUSED_PREFIXES, why_refused
from chatlearn.errors import ConfigError

REFUSED = [
    ({"position_embedding_type": "ropee"}, "expected one of rope, learned_absolute, none"),
    ({"q_lora_rank": 8}, "q_lora_rank is for multi_latent_attention: true"),
    ({"perform_initialization": False}, "breaks the gradient norm"),
    ({"hidden_size": -16}, "hidden_size: got -16, expected 1 or more"),
    ({"num_layers": 0}, "num_layers: got 0, expected 1 or more"),
    ({"lr": -1.0}, "lr: got -1.0, expected 0 or more"),
    ({"optimizer": "adm"}, "expected one of adam, sgd"),
    ({"lr_warmup_steps": 5, "lr_decay_steps": 4}, "lr_warmup_steps=5 is not less than"),
    ({"lr_decay_style": "WSD", "lr_decay_steps": 9}, "WSD needs lr_wsd_decay_steps"),
    ({"lr_decay_style": "cosine"}, "lr_decay_style=cosine needs lr_decay_steps"),
    ({"num_moe_experts": 6, "expert_model_parallel_size": 4}, "no multiple of expert_model"),
    ({"module": "megatron_adapters:PolicyTrainer"}, "needs num_layers, hidden_size"),
    ({"softmax_type": "off-by-one"}, "attention has the usual softmax"),
    ({"attention_softmax_in_fp32": False}, "attention's softmax is always in float32"),
    ({"num_moe_experts": 2, "moe_router_topk": 4}, "moe_router_topk=4 is more than num_moe_exp"),
    ({"num_moe_experts": 1}, "moe_router_topk=2 is more than num_moe_experts=1"),
    ({"moe_ffn_hidden_size": 8}, "moe_ffn_hidden_size needs num_moe_experts"),
    ({"num_moe_experts": 4, "num_layers": 4, "moe_layer_freq": [1]}, "expected 4 numbers"),
    ({"num_moe_experts": 4, "num_layers": 4, "moe_layer_freq": 0}, "expected 1 or more"),
    ({"num_moe_experts": 4, "moe_token_dispatcher_type": "flex"}, "one of alltoall, allgather"),
    ({"hidden_dropout": 1.0}, "hidden_dropout: got 1.0, expected 0 or more and less than 1"),
    ({"attention_dropout": -0.1}, "attention_dropout: got -0.1, expected 0 or more"),
    ({"adam_beta1": 1.5}, "adam_beta1: got 1.5, expected 0 or more and less than 1"),
    ({"init_method_std": -1.0}, "init_method_std: got -1.0, expected 0 or more"),
    ({"rotary_percent": 3.0}, "rotary_percent: got 3.0, expected more than 0 and at most 1"),
    ({"rotary_percent": 0.0}, "rotary_percent: got 0.0, expected more than 0"),
    ({"kv_channels": 7}, "kv_channels x rotary_percent = 7 x 1 = 7 is not even"),
    ({"hidden_size": 12, "num_attention_heads": 4}, "= 3 x 1 = 3 is not even"),
    ({"kv_channels": 8, "rotary_percent": 0.4}, "= 8 x 0.4 = 3 is not even"),
    ({"recompute_granularity": "full"}, "=full needs recompute_method .* recompute_num_layers"),
    ({"recompute_method": "uniform"}, "need recompute_granularity=full, got None"),
    ({"num_gpu": True}, r"num_gpu: got True \(bool\), expected a whole number"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_field_that_cannot_be_is_refused_before_a_worker_starts(fields, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"models": {"m": fields}})


REFUSED_NAMES = sorted(n for group in MEGATRON_FIELDS.values() for n in group if why_refused(n))
A_VALUE = {"bool": True, "int": 3, "float": 0.3, "str": "x", "list": [1], "dict": {"a": 1}}


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_a_field_without_effect_is_refused_by_name(name):
    [kinds] = {group[name] for group in MEGATRON_FIELDS.values() if name in group}
    with pytest.raises(ConfigError, match=f"models.m: {name} is not supported yet: ."):
        load_config({"models": {"m": {name: A_VALUE[kinds[0]]}}})


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_a_field_without_effect_may_be_switched_off(name):
    assert load_config({"models": {"m": {name: None}}}).models["m"].megatron == {name: None}


def test_every_refused_name_is_a_field_of_megatron():
    known = {name for group in MEGATRON_FIELDS.values() for name in group}
    assert set(REFUSED_FIELDS) <= known
    used = {p for p in REFUSED_PREFIXES for n in known if n == p or n.startswith(f"{p}_")}
    assert used == set(REFUSED_PREFIXES)


@pytest.mark.parametrize(
    "name",
    ["fp4", "fp8_margin", "mamba_head_dim", "muon_momentum", "linear_key_head_dim"],
)
def test_what_looks_alike_is_told_apart(name):
    assert why_refused(name) is not None
    assert why_refused(f"x{name}") is None


@pytest.mark.parametrize("name", ["hidden_size", "moe_layer_freq", "loss_scale", "linearity"])
def test_fields_that_act_are_not_refused(name):
    assert why_refused(name) is None


def test_a_runtime_env_without_worker_processes_is_refused():
    content = {"runtime_env": {"env_vars": {"A": "1"}}, "runtime": {"backend": "local"}}
    with pytest.raises(ConfigError, match="runtime_env: env_vars is for workers of the ray backe"):
        load_config(content)


def test_numbers_are_taken_where_text_is_expected():
    assert load_config({"runtime": {"exp_name": 42}}).runtime.exp_name == "42"


def test_an_empty_section_is_a_section_with_defaults():
    assert load_config({"runtime": None, "models": None}).runtime.num_episode == 1
