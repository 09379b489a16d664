"""Tokenizers of Hugging Face folders, by the `transformers` library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["HuggingFaceTokenizer"]

_GENERATION_FILE = "generation_config.json"


class HuggingFaceTokenizer:
    """The tokenizer of a folder; pickles by its path. Nothing is downloaded, no code of it runs.

    Args:
        path: of the folder.
        chat_template: file of another chat template than the folder's; None: the folder's.

    Raises:
        DataError: the folder holds no tokenizer, or one without an end token.
        ConfigError: `transformers` is not installed.
    """

    def __init__(self, path: str | Path, chat_template: str | None = None) -> None:
        self.path = str(path)
        self._template_path = chat_template
        self._tokenizer = _load(self.path)
        if chat_template is not None:
            try:
                text = Path(chat_template).read_text(encoding="utf-8")
            except OSError as error:
                raise ConfigError(
                    f"chat template {chat_template} cannot be read: {error}"
                ) from error
            self._tokenizer.chat_template = text
        eos = self._tokenizer.eos_token_id
        if eos is None:
            raise DataError(f"the tokenizer in {path} has no end token: set eos_token in it")
        self._eos_id = int(eos)
        found = cast("list[int]", self._tokenizer("").input_ids)
        bos = self._tokenizer.bos_token_id
        # Some have a begin token that they do not put in front of a text.
        self._bos_id = int(bos) if bos is not None and found[:1] == [bos] else -1
        self._stop_ids = self._read_stop_ids()

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        return (type(self), (self.path, self._template_path))

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return len(self._tokenizer)

    @property
    def bos_id(self) -> int:
        """Token that begins a sequence; -1 where a text gets none."""
        return self._bos_id

    @property
    def eos_id(self) -> int:
        """Token that ends a sequence."""
        return self._eos_id

    @property
    def pad_id(self) -> int:
        """Token that fills up; -1 where there is none."""
        found = self._tokenizer.pad_token_id
        return -1 if found is None else int(found)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The end token, and those that generation_config.json names."""
        return self._stop_ids

    @property
    def padding_side(self) -> str:
        """`left` or `right`."""
        return str(self._tokenizer.padding_side)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin and end tokens."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, without control tokens; unknown ids have no text."""
        known = [int(token) for token in token_ids if 0 <= int(token) < self.vocab_size]
        return str(self._tokenizer.decode(known, skip_special_tokens=True))

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[int]:
        """Token ids of chat messages, with all control tokens that the template writes.

        Raises:
            DataError: there is no template, or it refuses the messages.
        """
        if self._tokenizer.chat_template is None:
            raise DataError(
                f"the tokenizer in {self.path} has no chat template: set runtime.chat_template to "
                "a Jinja file, or give prompts as text"
            )
        from jinja2 import TemplateError

        try:
            return list(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    add_generation_prompt=add_generation_prompt,
                    tokenize=True,
                    return_dict=False,
                )
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"the chat template in {self.path} refuses the messages: {error}"
            ) from error

    def _read_stop_ids(self) -> tuple[int, ...]:
        path = Path(self.path) / _GENERATION_FILE
        found: list[int] = [self._eos_id]
        if path.is_file():
            try:
                entry: Any = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            except (OSError, ValueError, AttributeError) as error:
                raise DataError(f"{path} cannot be read as JSON: {error}") from error
            entries = cast("list[Any]", entry) if isinstance(entry, list) else [entry]
            found += [int(number) for number in entries if number is not None]
        strange = [number for number in found if not 0 <= number < self.vocab_size]
        if strange:
            raise DataError(
                f"{path}: eos_token_id {strange} lies outside the {self.vocab_size} tokens"
            )
        return tuple(dict.fromkeys(found))


def _load(path: str) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ConfigError(
            f"tokenizer folder {path}: Hugging Face tokenizers need transformers, which is not "
            "installed: pip install transformers, or name a sentencepiece .model file"
        ) from error
    tokenizers: Any = AutoTokenizer
    try:
        return tokenizers.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise DataError(f"folder {path} holds no tokenizer that can be loaded: {error}") from error
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises plain exceptions
        raise DataError(f"the tokenizer in {path} is damaged: {error}") from error
