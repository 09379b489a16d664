"""The samples of an episode: prompts drawn, sent through the environment flow, collected."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from chatlearn.data.balance import measure_loads
from chatlearn.data.copying import copy_value
from chatlearn.data.relay import EpisodeRelayBuffer, RelaySampleManager, RelayStore, identify_rows
from chatlearn.data.rows import NamedInput, RowBatch, RowId, join_inputs
from chatlearn.data.sampler import PromptSampler, SamplerState, expand_samples
from chatlearn.data.stream import StreamDataset
from chatlearn.engine.episode_metrics import summarize_records, wall_seconds
from chatlearn.engine.evaluation import collect_rows
from chatlearn.engine.prompts import PromptSource
from chatlearn.engine.worker_calls import RowRequest
from chatlearn.errors import ConfigError, DataError
from chatlearn.flow.execute import FlowRun, RowSource, StageRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.engine.engine import Engine
    from chatlearn.engine.run_log import RunLog
    from chatlearn.engine.session import Session

__all__ = ["Rollout", "RolloutState", "Sources"]

logger = logging.getLogger(__name__)

Sources = tuple[RowSource, ...]


@dataclass(frozen=True)
class RolloutState:
    """Where a rollout stands between two episodes.

    Attributes:
        sampler: the data order.
        lengths: prompts of each data set.
        relay: past episodes that are kept.
        manager: what the sample manager wants to keep.
    """

    sampler: SamplerState
    lengths: tuple[int, ...]
    relay: tuple[EpisodeRelayBuffer, ...] = ()
    manager: Mapping[str, Any] = field(default_factory=dict[str, Any])


class Rollout:
    """Makes the samples of one episode after another.

    Without an environment the samples are the data set's rows as they are.
    """

    def __init__(self, engine: Engine, session: Session, log: RunLog) -> None:
        flows = session.plan.flows
        graph = flows.environment or flows.trainer
        if graph is None:
            raise ConfigError("a rollout needs an environment or a trainer")
        self.session = session
        self.runtime = session.config.runtime
        self.records: list[StageRecord] = []
        self._log = log
        self._graph = flows.environment
        self._manager = engine.sample_manager
        if isinstance(self._manager, RelaySampleManager):
            self._manager.attach(self.runtime)
        self._relay = RelayStore(self.runtime.max_relay_episode, self.runtime.relay_episode_offset)
        first = graph.nodes[0].model_name
        self._prompts = PromptSource(session, first, "train", engine.datasets, is_eval=False)
        log.tell_dropped("train", self._prompts.num_dropped, sum(self._prompts.lengths))
        self._sampler = PromptSampler(
            self._prompts.lengths,
            self.runtime.data_ratio,
            shuffle=self.runtime.data_shuffle,
            seed=self.runtime.seed,
        )
        self._run: FlowRun | None = None
        self._stream: StreamDataset | None = None
        # Before a sample manager has chosen.
        self._made: StreamDataset | None = None
        self._num_samples = 0
        self._relay_metrics: dict[str, float] = {}

    @property
    def state(self) -> RolloutState:
        """Where data order and sample manager stand; `restore` takes it back."""
        manager = self._manager
        own: Mapping[str, Any] = {}
        if isinstance(manager, RelaySampleManager):
            # It goes on changing what it keeps.
            own = copy_value(dict(manager.state()))
        return RolloutState(
            self._sampler.state, tuple(self._prompts.lengths), self._relay.episodes, own
        )

    def restore(self, state: RolloutState) -> None:
        """Go on from `state`.

        Raises:
            DataError: it is of other data sets.
        """
        if state.lengths != tuple(self._prompts.lengths):
            raise DataError(
                f"the checkpoint's data sets have {state.lengths} prompts, these have "
                f"{tuple(self._prompts.lengths)}: the order of the data cannot go on"
            )
        self._sampler.restore(state.sampler)
        self._relay.restore(state.relay)
        if isinstance(self._manager, RelaySampleManager):
            self._manager.restore(state.manager)

    def start(self, episode: int) -> StreamDataset:
        """Draw the episode's prompts and set them going; gives the stream that they end in."""
        count = self.runtime.sample_per_episode or sum(self._prompts.lengths)
        drawn = self._sampler.draw(count)
        pairs = expand_samples(drawn, self.runtime.num_samples_per_prompt)
        requests = [RowRequest(p.dataset_index, p.index, row_id) for row_id, p in pairs]
        self.records = []
        self._relay_metrics = {}
        is_dynamic = self.runtime.stream_data_loader_type == "dynamic"
        batch_size = self.runtime.train_global_batch_size or len(pairs)
        row_ids = tuple(row_id for row_id, _ in pairs)
        stream = StreamDataset(row_ids, batch_size, is_dynamic=is_dynamic)
        if self._graph is None:
            self._prompts.load(requests, on_row=stream.add)
        else:
            self._start_flow(self._prompts.load(requests), stream)
        self._stream = self._made = stream
        self._num_samples = stream.num_rows
        if self._manager is not None:
            self._stream = stream = self._select_samples(stream, episode)
        return stream

    def finish(self) -> None:
        """Wait until the episode's samples are all there."""
        if self._run is not None:
            run = self._run
            self.session.loop.run_until(lambda: run.is_done)
            self.session.loop.detach(run)
            self._run = None
        elif self._stream is not None:
            stream = self._stream
            self.session.loop.run_until(lambda: stream.is_complete)

    def fetch_rows(self) -> list[dict[str, Any]]:
        """The episode's samples as dicts, in row order, returned values merged into one.

        Raises:
            DataError: two returned values share a key with different content.
        """
        return [] if self._stream is None else self._fetch(self._stream)

    def fetch_made_rows(self) -> list[dict[str, Any]]:
        """As `fetch_rows`, of all samples, whatever a sample manager has chosen."""
        return [] if self._made is None else self._fetch(self._made)

    def _fetch(self, stream: StreamDataset) -> list[dict[str, Any]]:
        sources = stream.sources()
        row_ids = tuple(sources)
        if not row_ids:
            return []
        inputs: list[NamedInput] = []
        for position, first in enumerate(cast("Sources", sources[row_ids[0]])):
            chosen = {row_id: cast("Sources", s)[position] for row_id, s in sources.items()}
            rows = collect_rows(self.session, chosen)
            inputs.append(NamedInput(first.producer, _build_batch(row_ids, rows, first.producer)))
        return join_inputs(row_ids, inputs).to_rows()

    def metrics(self) -> dict[str, float]:
        """Metrics of the finished rollout."""
        metrics = summarize_records(self.records, "rollout")
        metrics.update({f"relay/{name}": v for name, v in self._relay_metrics.items()})
        seconds = wall_seconds(self.records)
        metrics["time/rollout"] = seconds
        length = metrics.get("rollout/response_length")
        if length is not None and seconds > 0:
            metrics["rollout/tokens_per_s"] = length * self._num_samples / seconds
        return metrics

    def _start_flow(self, rows: Mapping[RowId, Sources], stream: StreamDataset) -> None:
        def add(row_id: RowId, sources: Sources) -> None:
            stream.add(row_id, sources)
            self._log.progress.stage("rollout", stream.num_arrived, stream.num_rows)

        if self._graph is None:
            raise ConfigError("there is no environment flow to run")
        self._run = FlowRun(
            self._graph,
            rows,
            self.session.loop,
            self.session.pool,
            self.session.flow_settings(),
            on_row=add,
            on_stage=self.records.append,
        )
        self.session.loop.attach(self._run)

    def _select_samples(self, stream: StreamDataset, episode: int) -> StreamDataset:
        """Let the user's sample manager decide, once every sample is there."""
        self.finish()
        row_ids = tuple(stream.sources())
        fetched = self.fetch_rows()
        if any("row_id" in row for row in fetched):
            raise DataError(
                "the samples have a column `row_id`, which is how a sample manager tells rows "
                "apart: give the column another name"
            )
        rows = [{**row, "row_id": row_id} for row_id, row in zip(row_ids, fetched, strict=True)]
        manager = self._manager
        if manager is None:
            return stream
        chosen = identify_rows(manager(self._relay.add(EpisodeRelayBuffer(episode, rows))))
        if isinstance(manager, RelaySampleManager):
            self._relay_metrics = manager.take_metrics()
        self._relay_metrics["skipped"] = float(not chosen)
        if not chosen:
            logger.warning(
                "episode %d is not trained on: the sample manager gave no rows of it", episode + 1
            )
        batch_size = self.runtime.train_global_batch_size or max(len(chosen), 1)
        selected = StreamDataset(tuple(chosen), batch_size, is_sorted=False)
        for index in range(selected.num_batches):
            ids = selected.batch_ids(index)
            batch = _build_batch(ids, [chosen[row_id] for row_id in ids], "the sample manager")
            stored, loads = self.session.backend.put(batch), measure_loads(batch.columns)
            sources = RowSource.of_rows("sample manager", stored, ids, loads)
            for row_id, source in sources.items():
                selected.add(row_id, (source,))
        return selected


def _build_batch(
    row_ids: Sequence[RowId], rows: Sequence[Mapping[str, Any]], producer: str
) -> RowBatch:
    try:
        return RowBatch.from_rows(row_ids, rows)
    except DataError as error:
        raise DataError(f"rows of {producer}: {error}") from error
