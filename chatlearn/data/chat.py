"""Chat messages: what counts as some, and templates that turn them into text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["ChatTemplate", "Messages", "check_messages", "is_messages", "split_conversation"]

Messages = list[dict[str, Any]]


def is_messages(value: Any) -> bool:
    """Whether a column's value is meant as chat messages: a list of mappings."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, dict) for entry in cast("list[Any]", value))


def check_messages(value: Any, name: str) -> Messages:
    """The messages, once it is sure that each has a role and a content.

    Raises:
        DataError: names the row and what is wrong.
    """
    if not is_messages(value):
        raise DataError(
            f"{name}: expected a list of messages such as {{'role': 'user', 'content': '...'}}, "
            f"got {type(value).__name__}"
        )
    for number, message in enumerate(cast("Messages", value)):
        missing = [key for key in ("role", "content") if not isinstance(message.get(key), str)]
        if missing:
            raise DataError(f"{name}: message {number} has no text in {', '.join(missing)}")
    return cast("Messages", value)


def split_conversation(chosen: Messages, rejected: Messages, name: str) -> int:
    """How many messages two conversations share at their beginning: their common prompt.

    Raises:
        DataError: they share none, or one has nothing beyond it.
    """
    count = 0
    for one, other in zip(chosen, rejected, strict=False):
        if one != other:
            break
        count += 1
    if count == 0 or count in (len(chosen), len(rejected)):
        raise DataError(
            f"{name}: `chosen` and `rejected` need a common beginning, the prompt, and different "
            f"answers after it; they share {count} of {len(chosen)} and {len(rejected)} messages"
        )
    return count


class ChatTemplate:
    """A Jinja template in the words of Hugging Face's chat templates; runs in a sandbox.

    Args:
        path: of the file.
        variables: what it may use besides `messages` and `add_generation_prompt`, such as
            `bos_token`.

    Raises:
        ConfigError: the file is missing, or no template.
    """

    def __init__(self, path: str | Path, variables: Mapping[str, str]) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._path = Path(path)
        self._variables = dict(variables)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        functions: dict[str, Any] = environment.globals
        functions["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(self._path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"chat template {path} cannot be read: {error.strerror}") from error
        except (TemplateError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat template {path} is no Jinja template: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of some messages.

        Raises:
            DataError: the template refuses them.
        """
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except TemplateError as error:
            raise DataError(f"chat template {self._path} refuses the messages: {error}") from error


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
