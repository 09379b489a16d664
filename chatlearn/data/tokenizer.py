"""The tokenizer contract, its sentencepiece implementation, and how to load either kind."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chatlearn.data.chat import ChatTemplate
from chatlearn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "SentencePieceTokenizer",
    "Tokenizer",
    "check_prompt_length",
    "find_tokenizer",
    "load_tokenizer",
]


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        ...

    @property
    def bos_id(self) -> int:
        """Token that begins a sequence; -1 where there is none."""
        ...

    @property
    def eos_id(self) -> int:
        """Token that ends a sequence."""
        ...

    @property
    def pad_id(self) -> int:
        """Token that fills up; -1 where there is none."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a response; the end token is the first."""
        ...

    @property
    def padding_side(self) -> str:
        """Where `pad_id` goes in a padded batch, `left` or `right`; nothing is padded here."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""
        ...

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[int]:
        """Token ids of chat messages, with all control tokens that the template writes.

        Args:
            messages: each with `role` and `content`.
            add_generation_prompt: end with what begins an answer.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece `.model` file; pickles by its path.

    Args:
        path: of the file.
        chat_template: Jinja file for chat messages; None: there is none.

    Raises:
        DataError: the file is missing or is no sentencepiece model.
        ConfigError: the template cannot be read.
    """

    def __init__(self, path: str | Path, chat_template: str | None = None) -> None:
        self.path = str(path)
        self._template_path = chat_template
        self._processor = _load(self.path)
        self._controls = {
            self._processor.id_to_piece(number): number
            for number in range(self.vocab_size)
            if self._processor.is_control(number)
        }
        self._template: ChatTemplate | None = None
        if chat_template is not None:
            names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
            variables = {
                name: self._processor.id_to_piece(number) if number >= 0 else ""
                for name, number in names.items()
            }
            self._template = ChatTemplate(chat_template, variables)

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return (type(self), (self.path, self._template_path))

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._processor.get_piece_size()

    @property
    def bos_id(self) -> int:
        """Token that begins a sequence; -1 where there is none."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """Token that ends a sequence."""
        return self._processor.eos_id()

    @property
    def pad_id(self) -> int:
        """Token that fills up; -1 where there is none."""
        return self._processor.pad_id()

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end token."""
        return (self.eos_id,)

    @property
    def padding_side(self) -> str:
        """`right`: sentencepiece does not say."""
        return "right"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""
        return list(self._processor.encode(text))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[int]:
        """Token ids of chat messages; control pieces that the template writes become tokens.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        if self._template is None:
            raise DataError(
                f"{self.path} has no chat template: set runtime.chat_template to a Jinja file, or "
                "give prompts as text"
            )
        text = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        pattern = "|".join(re.escape(piece) for piece in sorted(self._controls, key=len)[::-1])
        found: list[int] = []
        for part in re.split(f"({pattern})", text) if pattern else [text]:
            if part in self._controls:
                found.append(self._controls[part])
            elif part:
                found += self.encode(part)
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens.

        A model's vocabulary may be larger than the tokenizer's: what it does not know has no text.
        """
        known = [int(token) for token in token_ids if 0 <= int(token) < self.vocab_size]
        return str(self._processor.decode(known))


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """A sentencepiece `.model` file, or the tokenizer of a Hugging Face folder.

    Args:
        path: of the file or folder.
        chat_template: Jinja file for chat messages; None: the folder's own.

    Raises:
        DataError: there is no such file, or it holds no tokenizer.
        ConfigError: the template cannot be read, or a library is not installed.
    """
    if os.path.isdir(path):
        from chatlearn.data.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer(path, chat_template)
    return SentencePieceTokenizer(path, chat_template)


def find_tokenizer(folder: str | Path) -> str | None:
    """The tokenizer that lies in a model's folder, as `runtime.tokenizer` would name it."""
    files = ("tokenizer.json", "tokenizer_config.json")
    if any(os.path.isfile(Path(folder) / file) for file in files):
        return str(folder)
    model = Path(folder) / "tokenizer.model"
    return str(model) if os.path.isfile(model) else None


def check_prompt_length(num_tokens: int, max_length: int, name: str) -> None:
    """Refuse a prompt that leaves no room for a response.

    Raises:
        DataError: names the row, its length and the limit.
    """
    if num_tokens >= max_length:
        raise DataError(
            f"{name} has {num_tokens} tokens; with max_sequence_length={max_length} a prompt may "
            f"have at most {max_length - 1}: shorten it, drop it, or raise max_sequence_length"
        )


def _load(path: str) -> Any:
    import sentencepiece

    if not os.path.isfile(path):
        raise DataError(f"tokenizer file {path} does not exist")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise DataError(f"tokenizer file {path} is no sentencepiece model: {error}") from error
