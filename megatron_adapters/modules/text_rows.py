# pyright: standard, reportPrivateImportUsage=false
"""Turns rows of text into rows of token ids, for every ready-made module's data set."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from chatlearn.data.chat import check_messages, is_messages, split_conversation
from chatlearn.data.tokenizer import Tokenizer, check_prompt_length
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from megatron_adapters.modules.base import MegatronModule

__all__ = ["TextRows", "build_text_dataset", "tokenize_rows"]

# A text column becomes a column of token ids; responses end with the end token.
_RESPONSES = {
    "response": "response_token_ids",
    "chosen": "chosen_token_ids",
    "rejected": "rejected_token_ids",
}


class TextRows(list[dict[str, Any]]):
    """Rows with token ids.

    Attributes:
        num_dropped: rows that were left out because their prompts are too long.
    """

    num_dropped = 0


def build_text_dataset(module: "MegatronModule", prompts: Sequence[Any]) -> TextRows:
    """Rows with token ids, for a module's `build_dataset`; see `tokenize_rows`."""
    needs_text = any(
        not isinstance(prompt, Mapping) or "prompt_token_ids" not in prompt for prompt in prompts
    )
    tokenizer = module.tokenizer if needs_text else None
    return tokenize_rows(
        prompts,
        tokenizer,
        module.settings.shape.max_sequence_length,
        is_dropping=module.runtime_args.prompts_too_long == "drop",
    )


def tokenize_rows(
    prompts: Sequence[Any],
    tokenizer: Tokenizer | None,
    max_length: int,
    *,
    is_dropping: bool = False,
) -> TextRows:
    """Rows with token ids beside their text.

    A prompt that is no mapping is the text itself. Rows that have `prompt_token_ids` are taken as
    they are (lists become int64 tensors). A text prompt gets the begin token in front, a
    `response`, `chosen` or `rejected` text the end token behind. Chat messages, in `prompt` or in
    `messages`, go through the tokenizer's chat template, which writes such tokens itself; answers
    are then messages, too, or texts. A pair of whole conversations without a prompt has their
    common beginning as its prompt.

    Args:
        prompts: the user's.
        tokenizer: None where no row needs one.
        max_length: the model's context, tokens.
        is_dropping: leave out prompts that do not fit the context, and count them.

    Raises:
        DataError: a row has no prompt, or does not fit the context, or none does; names the row.
    """
    rows = TextRows()
    for number, prompt in enumerate(prompts):
        row = dict(prompt) if isinstance(prompt, Mapping) else {"prompt": prompt}
        name = f"prompt {number}"
        for key in [key for key in row if key.endswith("_token_ids")]:
            row[key] = torch.as_tensor(row[key], dtype=torch.int64)
        if "prompt_token_ids" not in row:
            _encode_row(row, tokenizer, name)
        _encode_answers(row, tokenizer, name)
        if is_dropping and len(row["prompt_token_ids"]) >= max_length:
            rows.num_dropped += 1
            continue
        check_prompt_length(len(row["prompt_token_ids"]), max_length, name)
        rows.append(row)
    if rows.num_dropped and not rows:
        raise DataError(
            f"all {rows.num_dropped} prompts have {max_length} tokens or more, which leaves no "
            "room for a response: raise max_sequence_length"
        )
    return rows


def _encode_row(row: dict[str, Any], tokenizer: Tokenizer | None, name: str) -> None:
    """Add the prompt's token ids, of text or of messages."""
    if "prompt" not in row and "messages" in row:
        row["prompt"] = row["messages"]
    if "prompt" not in row and is_messages(row.get("chosen")) and is_messages(row.get("rejected")):
        chosen = check_messages(row["chosen"], f"{name}, chosen")
        rejected = check_messages(row["rejected"], f"{name}, rejected")
        count = split_conversation(chosen, rejected, name)
        row["prompt"] = chosen[:count]
        row["chosen"], row["rejected"] = chosen[count:], rejected[count:]
    prompt = row.get("prompt")
    if tokenizer is not None and is_messages(prompt):
        messages = check_messages(prompt, name)
        found = tokenizer.render_chat(messages, add_generation_prompt=True)
        row["prompt_token_ids"] = torch.tensor(found, dtype=torch.int64)
        return
    if not isinstance(prompt, str) or tokenizer is None:
        raise DataError(
            f"{name} has neither `prompt_token_ids` nor a `prompt` of text or messages with a "
            f"tokenizer; its columns are {', '.join(map(str, row))}"
        )
    begin = [tokenizer.bos_id] if tokenizer.bos_id >= 0 else []
    row["prompt_token_ids"] = torch.tensor([*begin, *tokenizer.encode(prompt)], dtype=torch.int64)


def _encode_answers(row: dict[str, Any], tokenizer: Tokenizer | None, name: str) -> None:
    for text, ids in _RESPONSES.items():
        answer = row.get(text)
        if ids in row or tokenizer is None:
            continue
        if isinstance(answer, str):
            row[ids] = torch.tensor([*tokenizer.encode(answer), tokenizer.eos_id])
        elif is_messages(answer):
            row[ids] = _encode_answer(row, tokenizer, answer, f"{name}, {text}")


def _encode_answer(
    row: Mapping[str, Any], tokenizer: Tokenizer, answer: Any, name: str
) -> torch.Tensor:
    """The tokens that the chat template writes for an answer, after those of the prompt."""
    messages = check_messages(answer, name)
    if not is_messages(row.get("prompt")):
        raise DataError(f"{name}: an answer of messages needs a prompt of messages")
    whole = tokenizer.render_chat([*row["prompt"], *messages], add_generation_prompt=False)
    prompt = row["prompt_token_ids"].tolist()
    if whole[: len(prompt)] != prompt:
        raise DataError(
            f"{name}: with the answer the chat template writes the prompt in another way than "
            "without it, so the answer's tokens cannot be told apart: give token ids"
        )
    return torch.tensor(whole[len(prompt) :], dtype=torch.int64)
