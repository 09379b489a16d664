"""Weights go from Megatron to a transformers model and back by boxes; both compute the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import huggingface_cases
import megatron_cases as cases
import pytest
import torch
from long_forms import every

from chatlearn.errors import SyncError
from chatlearn.models.base import BaseModule

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 37,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
FIELDS = {"num_layers": 2, "num_query_groups": 2}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 16,
    "moe_router_load_balancing_type": "none",
}
SMALL_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "norm_topk_prob": True}
TIED = {"untie_embeddings_and_output_weights": False}


@dataclass(frozen=True)
class Family:
    """One architecture in Megatron's words and in those of transformers."""

    name: str
    fields: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)

    def build(self, head="ForCausalLM", **options):
        """A transformers model whose every weight is a nan."""
        config = getattr(transformers, f"{self.name}Config")
        model = getattr(transformers, f"{self.name}{head}")(
            config(**{**SIZES, **self.options, **options})
        )
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(float("nan"))
        return model.eval()


FAMILIES = {
    "llama": Family("Llama"),
    "llama-biases": Family(
        "Llama", {"add_bias_linear": True}, {"attention_bias": True, "mlp_bias": True}
    ),
    "mistral-tied": Family("Mistral", TIED, {"tie_word_embeddings": True}),
    "qwen2": Family("Qwen2", {"add_qkv_bias": True}),
    "qwen2-tied": Family("Qwen2", {"add_qkv_bias": True, **TIED}, {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3", {"qk_layernorm": True, "kv_channels": 16}, {"head_dim": 16}),
    "mixtral": Family("Mixtral", EXPERTS, {"num_local_experts": 4, "intermediate_size": 16}),
    "qwen2-moe": Family(
        "Qwen2Moe",
        {
            **EXPERTS,
            "add_qkv_bias": True,
            "moe_shared_expert_intermediate_size": 24,
            "moe_shared_expert_gate": True,
        },
        {**SMALL_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    ),
    "qwen3-moe": Family(
        "Qwen3Moe",
        {**EXPERTS, "qk_layernorm": True},
        {**SMALL_EXPERTS, "num_experts": 4, "head_dim": 8},
    ),
    # Dense layers before those with experts, a shared expert, and experts chosen by a bias.
    "glm4-moe": Family(
        "Glm4Moe",
        {
            **EXPERTS,
            "moe_layer_freq": [0, 1],
            "moe_shared_expert_intermediate_size": 16,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 1.5,
            "add_qkv_bias": True,
            "qk_layernorm": True,
            "rotary_percent": 0.5,
        },
        {
            **SMALL_EXPERTS,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "use_qk_norm": True,
            "head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
LAYOUTS = {"one": (1, {}), "tp2": (2, TP2), "pp2": (2, PP2), "ep2": (2, EP2)}
PAIRS = [
    *((name, "one") for name in FAMILIES),
    *((name, "tp2") for name, family in FAMILIES.items() if "num_moe_experts" not in family.fields),
    *((name, "ep2") for name, family in FAMILIES.items() if "num_moe_experts" in family.fields),
    ("llama", "pp2"),
    ("qwen2-tied", "pp2"),
    ("glm4-moe", "pp2"),
]


class Transformers(BaseModule):
    """A plain module with a transformers model."""

    weight_naming = "huggingface"

    def __init__(self, model):
        super().__init__("engine")
        self.model = model

    def exported(self):
        return self.weight_shards(), self.weight_tensors()


def copy(sources, destinations):
    """Write every box that a source and a destination share; both (shards, tensors) by rank."""
    held = {}
    for shards, tensors in sources:
        for shard in shards:
            held.setdefault(shard.key, []).append((shard, tensors[shard.local_name]))
    wanted = {shard.key for shards, _ in destinations for shard in shards}
    assert set(held) == wanted
    for shards, tensors in destinations:
        for shard in shards:
            for source, values in held[shard.key]:
                assert source.global_shape == shard.global_shape
                box = source.box.intersect(shard.box)
                if box is not None:
                    target = tensors[shard.local_name][shard.local_slices(box)]
                    target.copy_(values[source.local_slices(box)].view(target.shape))


def score(model, rows):
    """Log-probabilities of the response tokens, in float32, row by row."""
    found = []
    for row in rows:
        prompt, response = row["prompt_token_ids"], row["response_token_ids"]
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0].float()
        logprobs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logprobs.gather(-1, response[:, None])[:, 0].tolist())
    return found


@pytest.mark.parametrize(("name", "layout"), every(2, PAIRS))
def test_a_transformers_model_takes_megatrons_weights_and_gives_them_back(ranks, name, layout):
    family, (size, fields) = FAMILIES[name], LAYOUTS[layout]
    rows = cases.make_rows(5)
    given = {**FIELDS, **family.fields, **fields}
    exported = ranks.run(size, huggingface_cases.export_renamed, given, rows)
    sources = [(shards, tensors) for shards, tensors, _ in exported]
    engine = Transformers(family.build())

    copy(sources, [engine.exported()])

    assert not any(tensor.isnan().any() for tensor in engine.model.state_dict().values())
    for found, wanted in zip(score(engine.model, rows), exported[-1][2], strict=True):
        assert found == pytest.approx(wanted, abs=1e-4)

    returned = [(s, {key: t.clone().zero_() for key, t in ts.items()}) for s, ts in sources]
    copy([engine.exported()], returned)
    for (shards, before), (_, after) in zip(sources, returned, strict=True):
        assert {shard.local_name for shard in shards} == set(before)
        for shard in shards:
            part = shard.local_slices()
            assert torch.equal(before[shard.local_name][part], after[shard.local_name][part])


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
def test_a_scalar_head_is_the_score_of_a_sequence_classifier(ranks, layout):
    size, fields = LAYOUTS[layout]
    exported = ranks.run(
        size, huggingface_cases.export_renamed, {**FIELDS, **TIED, **fields}, (), "value"
    )
    engine = Transformers(FAMILIES["llama"].build("ForSequenceClassification", num_labels=1))
    copy([(shards, tensors) for shards, tensors, _ in exported], [engine.exported()])
    head = exported[-1][1]["0.output_layer.weight"]
    assert torch.equal(engine.model.score.weight, head)
    assert not any(tensor.isnan().any() for tensor in engine.model.state_dict().values())


def test_tied_weights_of_a_transformers_model_are_described_once():
    engine = Transformers(FAMILIES["qwen2-tied"].build())
    keys = [shard.key for shard in engine.weight_shards()]
    assert "model.embed_tokens.weight" in keys
    assert "lm_head.weight" not in keys
    assert not any("rotary" in key for key in keys)
    assert "lm_head.weight" in {
        s.key for s in Transformers(FAMILIES["qwen2"].build()).weight_shards()
    }


def test_a_naming_that_a_module_does_not_know_is_refused():
    engine = Transformers(FAMILIES["llama"].build())
    assert engine.weight_shards_in("huggingface") == engine.weight_shards()
    with pytest.raises(
        SyncError, match="'engine' cannot tell .* 'megatron', only in 'huggingface'"
    ):
        engine.weight_shards_in("megatron")
