"""A Megatron trainer gives its weights to a plain `transformers` model through the engine."""

from __future__ import annotations

import pytest
import torch

from chatlearn import BaseModule, Engine, Environment, Evaluator, Trainer
from megatron_adapters import PolicyReference, PolicyTrainer

transformers = pytest.importorskip("transformers")

SIZES = {
    "num_layers": 2,
    "bf16": False,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "vocab_size": 37,
    "max_sequence_length": 24,
    "init_method_std": 0.2,
}
ROWS = [
    {"prompt_token_ids": torch.tensor([3, 4 + n]), "response_token_ids": torch.tensor([n, 9, 5])}
    for n in range(6)
]


class Served(BaseModule):
    """What an inference engine that loads Hugging Face weights would be."""

    weight_naming = "huggingface"

    def setup(self):
        self.model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=37,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=24,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
                tie_word_embeddings=False,
            )
        ).eval()

    @torch.no_grad()
    def forward_step(self, data):
        found = []
        for prompt, response in zip(
            data["prompt_token_ids"], data["response_token_ids"], strict=True
        ):
            logits = self.model(torch.cat([prompt, response])[None]).logits[0]
            scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            found.append(scores.gather(1, response[:, None])[:, 0])
        return {"served_logprobs": found, **data}

    eval_step = forward_step


def test_a_transformers_model_scores_as_the_megatron_trainer_does(learn_locally):
    served, reference = Served("served"), PolicyReference("reference")
    trainer = PolicyTrainer("policy_trainer")
    engine = (
        Engine(
            Environment(lambda batch: served.forward_step(batch)),
            Trainer(lambda batch: trainer.train_step(batch)),
            Evaluator(lambda batch: reference.forward_step(served.eval_step(batch))).set_dataset(
                ROWS
            ),
        )
        .set_parameter_sync(trainer, served)
        .set_parameter_sync(trainer, reference)
        .set_dataset(ROWS)
    )
    result = learn_locally(
        engine,
        {"policy_trainer": {**SIZES, "lr": 0.01}, "reference": SIZES},
        num_episode=2,
        sample_per_episode=6,
        algorithm={"loss": "sft"},
        validate_param_sync="full",
    )
    rows = result.evaluation["reference"]
    assert len(rows) == 6
    for row in rows:
        assert torch.allclose(row["served_logprobs"], row["ref_logprobs"], atol=1e-4)
    spread = torch.stack([row["served_logprobs"] for row in rows]).std()
    assert spread > 0.1
