"""What a run leaves behind: its folder, metrics and timeline, and what a person sees meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from chatlearn.config import dump_config
from chatlearn.metrics.progress import ProgressDisplay, format_evaluation, open_progress
from chatlearn.metrics.run_folder import RunFolder
from chatlearn.metrics.timeline import Timeline
from chatlearn.metrics.unwritten import close_all
from chatlearn.metrics.writers import (
    JsonLinesWriter,
    MetricLog,
    MetricWriter,
    TensorBoardWriter,
    WandbWriter,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from chatlearn.config import Config
    from chatlearn.flow.execute import StageRecord

__all__ = ["RunLog"]


@dataclass
class RunLog:
    """Everything that is written during a run; a context manager that closes it.

    What cannot be written ends the run with a `ChatLearnError`, unless another error does.
    """

    folder: RunFolder
    metrics: MetricLog
    timeline: Timeline
    progress: ProgressDisplay

    @classmethod
    def open(cls, config: Config) -> RunLog:
        """Make the run folder and open what goes into it."""
        runtime = config.runtime
        folder = RunFolder.create(runtime.output_dir, runtime.exp_name, dump_config(config))
        writers: list[MetricWriter] = [JsonLinesWriter(folder.metrics_file)]
        if runtime.enable_tensorboard:
            writers.append(TensorBoardWriter(folder.tensorboard_dir))
        if runtime.enable_wandb:
            writers.append(WandbWriter(runtime.wandb_project, runtime.wandb_name, folder.path))
        return cls(folder, MetricLog(writers), Timeline(folder.timeline_file), open_progress())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        closers = (self.timeline.write, self.metrics.close, self.progress.close)
        close_all(closers, after=error)

    def write(self, episode: int, num_episodes: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a finished episode."""
        self.metrics.write(episode + 1, metrics)
        self.timeline.write()
        self.progress.episode(episode, num_episodes, metrics)

    def rewind(self, history: Sequence[Mapping[str, float]]) -> None:
        """Let the metrics be those of `history`, as after going back to a checkpoint."""
        self.metrics.rewind(history)

    def write_extra(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the evaluation before training."""
        self.metrics.write(step, metrics)
        self.progress.message("  ".join(["before training", *format_evaluation(metrics)]))

    def tell_dropped(self, name: str, num_dropped: int, num_kept: int) -> None:
        """Say how many prompts of a data set were too long; nothing where none was."""
        if num_dropped:
            total = num_dropped + num_kept
            self.progress.message(
                f"{num_dropped} of {total} {name} prompts leave no room for a response and are "
                "left out"
            )
            key = f"{name}_prompts_dropped"
            # A run that goes on has it already.
            if not any(key in entry for entry in self.metrics.history):
                self.write_extra(0, {key: float(num_dropped)})

    def add_spans(self, records: Iterable[StageRecord]) -> None:
        """Put finished calls on the timeline."""
        for record in records:
            name = f"{record.flow_name}: {record.method_name}"
            self.timeline.add(name, record.lane, record.report.start_s, record.report.end_s)
