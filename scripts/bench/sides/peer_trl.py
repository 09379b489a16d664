# pyright: standard, reportPrivateImportUsage=false
"""The peer for GRPO steps: TRL's `GRPOTrainer` on the weights that all sides start from."""

from __future__ import annotations

import random
import string
import sys
import tempfile
import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from scripts.bench.sides.gate import Gate, StepGate, parse_side_arguments

_NUM_PROMPTS = 512


class _Pause(TrainerCallback):
    """Waits for the benchmark before each step, and stops the training after the last."""

    def __init__(self, gate: StepGate) -> None:
        self._gate = gate

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Wait until a step is ordered."""
        del args, state
        if not self._gate.before_step():
            control.should_training_stop = True


def build_tokenizer() -> Any:
    """One token a character; padding, end and unknown come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *string.printable]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def build_trainer(options: dict[str, Any], gate: StepGate) -> Any:
    """A trainer that makes as many steps as are ordered; the reward counts one letter."""
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportMissingImports]

    def reward(completions: list[str], completion_ids: list[Any], **_: Any) -> list[float]:
        gate.count(samples=len(completions), tokens=sum(map(len, completion_ids)))
        return [float(text.count("a")) for text in completions]

    draw, new_tokens = random.Random(0), options["new_tokens"]
    prompts = [
        "".join(draw.choices(string.ascii_letters, k=options["prompt_length"]))
        for _ in range(_NUM_PROMPTS)
    ]
    settings = GRPOConfig(
        output_dir=options["folder"],
        per_device_train_batch_size=options["num_prompts"] * options["num_samples"],
        num_generations=options["num_samples"],
        max_completion_length=new_tokens,
        max_steps=options["num_steps"],
        learning_rate=options["lr"],
        beta=options["kl_coef"],
        use_cpu=True,
        bf16=options["dtype"] == "bfloat16",  # autocast
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
        generation_kwargs=None if options["is_variable"] else {"min_new_tokens": new_tokens},
    )
    return GRPOTrainer(
        model=options["weights"],
        reward_funcs=reward,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=build_tokenizer(),
        args=settings,
        callbacks=[_Pause(gate)],
    )


def main() -> int:
    """Load the model, then step by step what is ordered."""
    warnings.filterwarnings("ignore")
    given = parse_side_arguments()
    options = given.options
    torch.set_num_threads(options["num_threads"])
    with tempfile.TemporaryDirectory() as folder:
        gate = StepGate(Gate(given.address))
        trainer = build_trainer({**options, "folder": folder}, gate)
        count = sum(parameter.numel() for parameter in trainer.model.parameters())
        gate.greet_with(num_parameters=count, dtype=options["dtype"])
        trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(main())
