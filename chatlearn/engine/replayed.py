"""What came of a step that was run again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Replay"]


@dataclass(frozen=True)
class Replay:
    """What a step did when it was run again.

    Attributes:
        subject: whose step it was, or of what the dump is.
        fault: what was wrong then, for a person.
        name: of the number that was wrong.
        value: of that number then.
        metrics: of the step now; empty where it raised.
        error: what it raised now, in one line; empty where it did not.
        is_exact: the model is as it was before the step.
        warnings: what the step said now.
        is_again: whether the fault has come again; None: where the number is as wrong as then.
    """

    subject: str
    fault: str
    name: str
    value: float
    metrics: Mapping[str, float]
    error: str
    is_exact: bool
    warnings: tuple[str, ...] = ()
    is_again: bool | None = None
