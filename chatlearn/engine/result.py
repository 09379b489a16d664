"""What `learn()` gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["RunResult"]


@dataclass(frozen=True)
class RunResult:
    """The outcome of one run.

    Attributes:
        run_dir: the run folder: config, metrics, timeline, checkpoints, logs.
        rollouts: one dict per sample of the last episode, where there is no trainer.
        evaluation: for each model that the evaluation flow returns, one dict per row in
            data-set order, of the last evaluation.
        metrics: one dict of numbers per episode, with `step`, the episodes finished by then (0:
            before training).
    """

    run_dir: Path
    rollouts: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    evaluation: dict[str, list[dict[str, Any]]] = field(
        default_factory=dict[str, list[dict[str, Any]]]
    )
    metrics: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
