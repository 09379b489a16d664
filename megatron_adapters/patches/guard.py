"""Patches fail loudly where upstream no longer looks the way they were written for."""

import inspect
from typing import Any

from chatlearn.errors import ChatLearnError

__all__ = ["expect_source"]


def expect_source(member: Any, fragment: str, patch: str) -> None:
    """Check that the source of a Megatron function still holds a fragment.

    Raises:
        ChatLearnError: it does not; names the patch, so that somebody looks at it.
    """
    try:
        source = inspect.getsource(member)
    except (OSError, TypeError) as error:
        raise ChatLearnError(f"patch {patch}: the source of {member!r} cannot be read") from error
    if fragment not in source:
        raise ChatLearnError(
            f"patch {patch}: {member.__module__}.{member.__qualname__} no longer contains "
            f"{fragment!r}. It was written for megatron-core 0.16; install that version, or look "
            "whether the patch is still needed"
        )
