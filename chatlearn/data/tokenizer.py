"""The tokenizer contract and its sentencepiece implementation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chatlearn.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SentencePieceTokenizer", "Tokenizer", "check_prompt_length", "find_tokenizer"]


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

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece `.model` file; pickles by its path.

    Raises:
        DataError: the file is missing or is no sentencepiece model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._processor = _load(self.path)

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return (type(self), (self.path,))

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

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""
        return list(self._processor.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens.

        A model's vocabulary may be larger than the tokenizer's: what it does not know has no text.
        """
        known = [int(token) for token in token_ids if 0 <= int(token) < self.vocab_size]
        return str(self._processor.decode(known))


def find_tokenizer(folder: str | Path) -> str | None:
    """The tokenizer that lies in a model's folder, as `runtime.tokenizer` would name it."""
    files = ("tokenizer.json", "tokenizer_config.json")
    if any((Path(folder) / file).is_file() for file in files):
        return str(folder)
    model = Path(folder) / "tokenizer.model"
    return str(model) if model.is_file() else None


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

    if not Path(path).is_file():
        raise DataError(f"tokenizer file {path} does not exist")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=path)
    except (RuntimeError, OSError) as error:
        raise DataError(f"tokenizer file {path} is no sentencepiece model: {error}") from error
