"""Configs of tiny Megatron runs, from YAML-like content alone."""

from __future__ import annotations

import torch

from chatlearn import BaseModule
from megatron_adapters import PolicyTrainer

SHAPE = {
    "num_layers": 2,
    "bf16": False,
    "hidden_size": 16,
    "ffn_hidden_size": 32,
    "num_attention_heads": 2,
    "vocab_size": 23,
    "max_sequence_length": 16,
    "lr": 1e-3,
}
GENERATION = {"max_new_tokens": 5, "num_slots": 8, "stop_token_ids": [2]}
KINDS = {
    "policy": "PolicyInference",
    "reference": "PolicyReference",
    "value": "ValueInference",
    "policy_trainer": "PolicyTrainer",
    "value_trainer": "ValueTrainer",
}


class LengthReward(BaseModule):
    """Likes short responses."""

    def forward_step(self, data):
        lengths = [len(ids) for ids in data["response_token_ids"]]
        return {**data, "rewards": -torch.tensor(lengths, dtype=torch.float32)}

    def eval_step(self, data):
        return self.forward_step(data)


class InfiniteReward(LengthReward):
    """A reward that is broken."""

    def forward_step(self, data):
        return {**data, "rewards": torch.full((len(data["response_token_ids"]),), float("inf"))}


class EvenReward(LengthReward):
    """Likes every response alike."""

    def forward_step(self, data):
        return {**data, "rewards": torch.zeros(len(data["response_token_ids"]))}


class ForgetfulTrainer(PolicyTrainer):
    """Remembers its old log-probabilities not quite right."""

    def prepare_episode(self, batches):
        super().prepare_episode(batches)
        self._old_logprobs = {key: value + 1e-6 for key, value in self._old_logprobs.items()}


def prompts(count):
    return [{"prompt_token_ids": [3 + i % 20, 4 + i % 7, 5]} for i in range(count)]


def pairs(count):
    return [
        {
            "prompt_token_ids": [3 + i % 20, 4],
            "chosen_token_ids": [5, 6, 2],
            "rejected_token_ids": [7, 2],
        }
        for i in range(count)
    ]


def config(engine, names, runtime, **models):
    """A whole config: the named Megatron models, then what `models` adds to them."""
    content = {name: {"module": f"megatron_adapters:{KINDS[name]}", **SHAPE} for name in names}
    if "policy" in content:
        content["policy"]["generation"] = GENERATION
    for name, section in models.items():
        content[name] = {**content.get(name, {}), **section}
    return {"models": content, "runtime": {"engine": engine, "seed": 3, **runtime}}


def saved_tensors(run_dir, episode, names):
    """Every tensor of trained models in a checkpoint: parameters and optimizer."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    found = {}
    for name in names:
        folder = run_dir / f"checkpoints/episode_{episode:06d}/models/{name}"
        state = _load_state_dict_from_keys(storage_reader=FileSystemReader(str(folder)))
        found |= {f"{name}.{k}": v for k, v in _flatten(state) if isinstance(v, torch.Tensor)}
    return found


def _flatten(state, path=""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


REWARD = {"module": "megatron_runs:LengthReward", "num_gpu": 0, "num_cpu": 1}
