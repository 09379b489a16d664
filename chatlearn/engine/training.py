"""Training on an episode's samples, batch by batch, while they may still be arriving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from chatlearn.errors import ConfigError
from chatlearn.flow.execute import TRAIN_METHOD, FlowRun, StageRecord
from chatlearn.flow.stage import prepare_episode

if TYPE_CHECKING:
    from chatlearn.data.rows import RowId
    from chatlearn.data.stream import StreamDataset
    from chatlearn.engine.rollout import Rollout, Sources
    from chatlearn.engine.session import Session
    from chatlearn.flow.graph import FlowGraph
    from chatlearn.flow.stage import TrainCall

__all__ = ["TrainingRecords", "train_on_samples"]

Batch = dict["RowId", "Sources"]


@dataclass(frozen=True)
class TrainingRecords:
    """What training on one episode did."""

    records: tuple[StageRecord, ...]
    num_batches: int


def train_on_samples(
    session: Session, rollout: Rollout, samples: StreamDataset, iteration: int
) -> TrainingRecords:
    """Train on every sample of the episode, `runtime.num_training_epoch` times.

    In the first epoch a batch is trained on as soon as it is there, unless a trainer wants to
    see the whole episode first.

    Args:
        session: the run.
        rollout: what makes the samples.
        samples: where they arrive.
        iteration: global batches trained on before.
    """
    graph = session.plan.flows.trainer
    if graph is None:
        raise ConfigError("training needs a trainer flow")
    trainer = _EpisodeTrainer(session, graph, iteration)
    runtime = session.config.runtime
    if any(session.infos[name].needs_whole_episode for name in graph.model_names):
        rollout.finish()
        trainer.prepare([samples.batch(at) for at in range(samples.num_batches)])
    for index in range(samples.num_batches):
        session.loop.run_until(lambda index=index: samples.has_batch(index))
        trainer.train(samples.batch(index))
    rollout.finish()
    for epoch in range(1, runtime.num_training_epoch):
        batches = samples.later_epoch(
            epoch, mode=runtime.training_shuffle_mode, seed=runtime.seed, episode=iteration
        )
        for batch in batches:
            trainer.train(cast("Batch", batch))
    return TrainingRecords(tuple(trainer.records), trainer.iteration - iteration)


class _EpisodeTrainer:
    """Runs the trainer flow over one global batch after another."""

    def __init__(self, session: Session, graph: FlowGraph, iteration: int) -> None:
        self.session = session
        self.graph = graph
        self.iteration = iteration
        self.records: list[StageRecord] = []

    def train(self, batch: Batch) -> None:
        """One update of every trainer."""
        self.session.run_flow(self._flow_run(batch, self.iteration))
        self.iteration += 1

    def prepare(self, batches: list[Batch]) -> None:
        """Show every batch to the trainers that want to see the whole episode first."""
        calls = []
        for node in self.graph.nodes:
            is_root_call = all(index == -1 for index in node.inputs)
            wants = self.session.infos[node.model_name].needs_whole_episode
            if node.method_name != TRAIN_METHOD or not is_root_call or not wants:
                continue
            cuts = [self._flow_run(b, self.iteration).train_calls(node, tuple(b)) for b in batches]
            for lane in self.session.pool.lanes(node.model_name):
                own: list[TrainCall] = [cut[lane.index] for cut in cuts]
                calls.extend(
                    lane.group.call(prepare_episode, own, ranks=lane.ranks, flow_line=node.line)
                )
        self.session.collect({"prepare": calls}, "prepare_episode")

    def _flow_run(self, batch: Batch, iteration: int) -> FlowRun:
        return FlowRun(
            self.graph,
            batch,
            self.session.loop,
            self.session.pool,
            self.session.flow_settings(iteration),
            on_stage=self.records.append,
        )
