"""Training on an episode's samples, batch by batch, while they may still be arriving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from chatlearn.errors import ConfigError
from chatlearn.flow.execute import TRAIN_METHOD, FlowRun, StageRecord
from chatlearn.flow.graph import ROOT
from chatlearn.flow.stage import prepare_episode, wants_whole_episode

if TYPE_CHECKING:
    from chatlearn.data.rows import RowId
    from chatlearn.data.stream import StreamDataset
    from chatlearn.engine.rollout import Rollout, Sources
    from chatlearn.engine.session import Session
    from chatlearn.flow.graph import FlowGraph, FlowNode
    from chatlearn.flow.lanes import Lane
    from chatlearn.runtime.contract import PendingCall

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
    see the whole episode first; which one does, the columns of the first batch decide. An episode
    without samples (a sample manager chose none) trains nothing.

    Args:
        session: the run.
        rollout: what makes the samples.
        samples: where they arrive.
        iteration: global batches trained on before.
    """
    graph = session.plan.flows.trainer
    if graph is None:
        raise ConfigError("training needs a trainer flow")
    runtime = session.config.runtime
    num_batches = samples.num_batches * runtime.num_training_epoch
    trainer = _EpisodeTrainer(session, graph, iteration, num_batches)
    if samples.num_batches and trainer.may_prepare:
        session.loop.run_until(lambda: samples.has_batch(0))
        nodes = trainer.find_preparing(samples.batch(0))
        if nodes:
            rollout.finish()
            trainer.prepare(nodes, [samples.batch(at) for at in range(samples.num_batches)])
    for index in range(samples.num_batches):
        session.loop.run_until(lambda index=index: samples.has_batch(index))
        trainer.start(samples.batch(index))
        if index + 1 < samples.num_batches and samples.has_batch(index + 1):
            trainer.plan(samples.batch(index + 1))
        trainer.finish()
    rollout.finish()
    for epoch in range(1, runtime.num_training_epoch):
        batches = samples.later_epoch(
            epoch, mode=runtime.training_shuffle_mode, seed=runtime.seed, episode=iteration
        )
        for index, batch in enumerate(batches):
            trainer.start(cast("Batch", batch))
            for following in batches[index + 1 : index + 2]:
                trainer.plan(cast("Batch", following))
            trainer.finish()
    return TrainingRecords(tuple(trainer.records), trainer.iteration - iteration)


class _EpisodeTrainer:
    """Runs the trainer flow over one global batch after another.

    While one is trained on, the next can be planned.
    """

    def __init__(
        self, session: Session, graph: FlowGraph, iteration: int, num_batches: int
    ) -> None:
        self.session = session
        self.graph = graph
        self.iteration = iteration
        self.num_batches = num_batches
        self.records: list[StageRecord] = []
        self._run: FlowRun | None = None
        self._planned: tuple[Batch, FlowRun] | None = None

    def start(self, batch: Batch) -> None:
        """Begin one update of every trainer."""
        planned, self._planned = self._planned, None
        if planned is not None and tuple(planned[0]) == tuple(batch):
            run = planned[1]
        else:
            run = self._flow_run(batch, self.iteration)
        self.session.num_updates += 1
        run.pump()
        self._run = run

    def plan(self, batch: Batch) -> None:
        """Cut the batch that comes next while workers are busy with this one."""
        run = self._flow_run(batch, self.iteration + 1)
        run.plan_training()
        self._planned = (batch, run)

    def finish(self) -> None:
        """Wait for the update that was begun."""
        if self._run is not None:
            self.session.run_flow(self._run)
            self._run = None
            self.iteration += 1

    @property
    def may_prepare(self) -> bool:
        """Whether some trainer may want to see the whole episode before its first update."""
        return bool(self._candidates())

    def find_preparing(self, batch: Batch) -> list[FlowNode]:
        """The calls whose trainers want to see an episode of such rows first."""
        row_id = next(iter(batch))
        run = self._flow_run({row_id: batch[row_id]}, self.iteration)
        calls: dict[int, list[PendingCall]] = {}
        for node in self._candidates():
            lane = self.session.pool.lanes(node.model_name)[0]
            call = run.train_calls(node, [row_id])[0]
            calls[node.index] = list(
                lane.group.call(
                    wants_whole_episode, call, ranks=lane.ranks[:1], flow_line=node.line
                )
            )
        answers = self.session.collect(calls, "wants_whole_episode")
        return [node for node in self._candidates() if answers[node.index][0]]

    def prepare(self, nodes: list[FlowNode], batches: list[Batch]) -> None:
        """Show every batch to the trainers of these calls."""
        places: list[tuple[str, Lane]] = []
        calls: dict[int, list[PendingCall]] = {}
        for node in nodes:
            cuts = [self._flow_run(b, self.iteration).train_calls(node, tuple(b)) for b in batches]
            for lane in self.session.pool.lanes(node.model_name):
                own = [cut[lane.index] for cut in cuts]
                found = lane.group.call(prepare_episode, own, ranks=lane.ranks, flow_line=node.line)
                calls[len(places)] = list(found)
                places.append((node.model_name, lane))
        name = "prepare_episode"
        for at, reports in self.session.collect(calls, name).items():
            model_name, lane = places[at]
            report = reports[lane.ranks.index(lane.output_rank)]
            record = StageRecord(self.graph.name, model_name, name, lane.label, report)
            self.records.append(record)

    def _candidates(self) -> list[FlowNode]:
        """The training calls that take the flow's own batch, of trainers that may want it all."""
        return [
            node
            for node in self.graph.nodes
            if node.method_name == TRAIN_METHOD
            and all(index == ROOT for index in node.inputs)
            and self.session.infos[node.model_name].needs_whole_episode
        ]

    def _flow_run(self, batch: Batch, iteration: int) -> FlowRun:
        return FlowRun(
            self.graph,
            batch,
            self.session.loop,
            self.session.pool,
            self.session.flow_settings(iteration, self.num_batches),
            on_stage=self.records.append,
        )
