# pyright: standard, reportPrivateImportUsage=false
"""PPO from a Hugging Face folder to one that transformers loads.

    .venv/bin/python -m scripts.examples.huggingface_ppo [--model DIR] [--lora] [key.path=value ...]

Without `--model` it makes a tiny random Qwen2 with a tokenizer of its own first: nothing is
downloaded. The reward likes short answers, so they get shorter.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = ["main", "make_model"]

_CONFIG = "configs/huggingface_ppo.yaml"
_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run the example; gives the folder that was written."""
    parser = argparse.ArgumentParser(description="PPO from a Hugging Face folder to another one.")
    parser.add_argument("--model", help="Hugging Face folder; default: a tiny one is made")
    parser.add_argument("--lora", action="store_true", help="train adapters instead of the weights")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="win over the file")
    given = parser.parse_args(arguments)
    folder = Path(given.model or "runs/huggingface_example/model")
    if given.model is None and not folder.exists():
        make_model(folder)
    os.environ["MODEL_DIR"] = str(folder)
    overrides = list(given.overrides)
    if given.lora:
        overrides += ["models.policy_trainer.lora.rank=8", "models.value_trainer.lora.rank=8"]

    from chatlearn.engine.from_config import build_engine
    from chatlearn.engine.state import init

    config = init(_CONFIG, overrides)
    result = build_engine(config).learn()
    checkpoint = max((result.run_dir / "checkpoints").glob("episode_*"))
    written = checkpoint / "models" / "policy_trainer" / "huggingface"
    _show(folder, written)
    return written


def make_model(folder: Path) -> None:
    """A tiny random Qwen2 and a byte-level tokenizer, as transformers saves them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=_SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=_SPECIAL[0], eos_token=_SPECIAL[1]
    )
    tokenizer.chat_template = _TEMPLATE
    config = Qwen2Config(
        vocab_size=320,  # room for what the tokenizer class adds
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _show(before: Path, after: Path) -> None:
    """Answers of both folders, by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(after)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "name a colour"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=False,
    )
    for title, folder in (("before", before), ("after", after)):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.manual_seed(0)
        samples = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            num_return_sequences=64,
            do_sample=True,
            pad_token_id=0,
        )
        lengths = (samples[:, prompt.shape[1] :] > 1).sum(dim=1).float()
        print(f"{title}: an answer has {lengths.mean().item():.1f} tokens on average")
    print(f"transformers loads {after}")


if __name__ == "__main__":
    main()
