# pyright: standard, reportPrivateImportUsage=false
"""Turns rows of text into rows of token ids, for every ready-made module's data set."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from chatlearn.data.tokenizer import Tokenizer, check_prompt_length
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from megatron_adapters.modules.base import MegatronModule

__all__ = ["build_text_dataset", "tokenize_rows"]

# A text column becomes a column of token ids; responses end with the end token.
_RESPONSES = {
    "response": "response_token_ids",
    "chosen": "chosen_token_ids",
    "rejected": "rejected_token_ids",
}


def build_text_dataset(module: "MegatronModule", prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows with token ids, for a module's `build_dataset`; see `tokenize_rows`."""
    needs_text = any(
        not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt for prompt in prompts
    )
    tokenizer = module.tokenizer if needs_text else None
    return tokenize_rows(prompts, tokenizer, module.settings.shape.max_sequence_length)


def tokenize_rows(
    prompts: Sequence[Any], tokenizer: Tokenizer | None, max_length: int
) -> list[dict[str, Any]]:
    """Rows with token ids beside their text.

    A prompt that is no mapping is the text itself. Rows that have `prompt_token_ids` are taken as
    they are (lists become int64 tensors). The prompt gets the begin token in front, a `response`,
    `chosen` or `rejected` text the end token behind.

    Args:
        prompts: the user's.
        tokenizer: None where no row needs one.
        max_length: the model's context, tokens.

    Raises:
        DataError: a row has no prompt, or does not fit the context; names the row.
    """
    rows: list[dict[str, Any]] = []
    for number, prompt in enumerate(prompts):
        row = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
        for key in [key for key in row if key.endswith("_token_ids")]:
            row[key] = torch.as_tensor(row[key], dtype=torch.int64)
        if "prompt_token_ids" not in row:
            row["prompt_token_ids"] = _encode_prompt(row, tokenizer, number)
        for text, ids in _RESPONSES.items():
            if isinstance(row.get(text), str) and ids not in row and tokenizer is not None:
                row[ids] = torch.tensor([*tokenizer.encode(row[text]), tokenizer.eos_id])
        check_prompt_length(len(row["prompt_token_ids"]), max_length, f"prompt {number}")
        rows.append(row)
    return rows


def _encode_prompt(
    row: Mapping[str, Any], tokenizer: Tokenizer | None, number: int
) -> torch.Tensor:
    text = row.get("prompt")
    if not isinstance(text, str) or tokenizer is None:
        raise DataError(
            f"prompt {number} has neither `prompt_token_ids` nor a text `prompt` with a tokenizer; "
            f"its columns are {', '.join(map(str, row))}"
        )
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    return torch.tensor([*begin, *tokenizer.encode(text)], dtype=torch.int64)
