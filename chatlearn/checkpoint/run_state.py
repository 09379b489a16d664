"""Where a run stood when a checkpoint was written, as JSON beside the models."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, cast

from chatlearn.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["STATE_FILE", "RunState", "read_run_state", "write_run_state"]

STATE_FILE = "run_state.json"
_FORMAT = 4
# Had versions of stale models only.
_STALE_ONLY_FORMAT = 3


@dataclass(frozen=True)
class RunState:
    """Where a run stood.

    Attributes:
        episode: episodes that are over.
        train_iteration: global batches trained on.
        num_drawn: prompts drawn in all.
        positions: prompts drawn from each data set.
        lengths: prompts of each data set.
        seed: of the run.
        version: number of the weights that the next sync gives.
        is_partial: the last of the episodes was cut short by a signal, so what follows is not what
            an undisturbed run would have done.
        trained: names of the trained models.
        stale: inference models whose weights were not those of their trainer, and are saved, too.
        synced: inference models that weight syncs go to.
        synced_versions: number of the weights that each of them has after a resume.
        created_s: when, seconds since the epoch.
    """

    episode: int
    train_iteration: int
    num_drawn: int
    positions: tuple[int, ...]
    seed: int
    lengths: tuple[int, ...] = ()
    version: int = 0
    is_partial: bool = False
    trained: tuple[str, ...] = ()
    stale: tuple[str, ...] = ()
    synced: tuple[str, ...] = ()
    synced_versions: tuple[int, ...] = ()
    created_s: float = field(default=0.0, compare=False)

    @property
    def versions(self) -> dict[str, int]:
        """Number of the weights of each model that weight syncs go to."""
        return dict(zip(self.synced, self.synced_versions, strict=True))


def write_run_state(folder: Path, state: RunState) -> None:
    """Write the state into a checkpoint's folder."""
    text = json.dumps({"format": _FORMAT, **asdict(state)}, indent=1)
    (folder / STATE_FILE).write_text(text, encoding="utf-8")


def read_run_state(checkpoint: Path) -> RunState:
    """The run's state in a checkpoint.

    Raises:
        CheckpointError: the file is missing or not what `write_run_state` writes.
    """
    path = checkpoint / STATE_FILE
    try:
        content = cast("dict[str, Any]", json.loads(path.read_text(encoding="utf-8")))
        number = content.pop("format")
        if number == _STALE_ONLY_FORMAT:
            content["synced"] = content["stale"]
            content["synced_versions"] = content.pop("stale_versions")
        elif number != _FORMAT:
            raise ValueError(f"expected format {_FORMAT}")
        kinds = {each.name: str(each.type) for each in fields(RunState)}
        if set(content) != set(kinds):
            raise ValueError(f"expected the entries {', '.join(kinds)}")
        state = RunState(**{name: _read(name, kinds[name], content[name]) for name in kinds})
        if len(state.synced) != len(state.synced_versions):
            raise ValueError(f"expected a version for each of {len(state.synced)} models")
        if not set(state.stale) <= set(state.synced):
            raise ValueError("expected a version for each stale model")
        return state
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _read(name: str, kind: str, value: Any) -> Any:
    """One entry, of the kind that its field has."""
    if kind.startswith("tuple"):
        inner = "int" if "int" in kind else "str"
        if isinstance(value, list):
            return tuple(_read(name, inner, entry) for entry in cast("list[Any]", value))
    elif kind == "float" and isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    elif kind == type(value).__name__ and not (kind == "int" and value < 0):
        return value
    raise ValueError(f"{name}: expected {kind}, got {value!r:.60}")
