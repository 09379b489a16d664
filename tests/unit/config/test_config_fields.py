import pytest

from chatlearn.config import load_config
from chatlearn.errors import ConfigError

REFUSED = [
    ({"position_embedding_type": "ropee"}, "expected one of rope, learned_absolute, none"),
    ({"multi_latent_attention": True}, "multi_latent_attention is not supported yet"),
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
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_field_that_cannot_be_is_refused_before_a_worker_starts(fields, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"models": {"m": fields}})


def test_numbers_are_taken_where_text_is_expected():
    assert load_config({"runtime": {"exp_name": 42}}).runtime.exp_name == "42"


def test_an_empty_section_is_a_section_with_defaults():
    assert load_config({"runtime": None, "models": None}).runtime.num_episode == 1
