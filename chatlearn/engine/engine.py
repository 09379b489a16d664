"""Engine: flows, data and weight syncs put together, and `learn()`, which runs them."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any, Self

from chatlearn.data.prompts import read_prompts
from chatlearn.engine.components import (
    Environment,
    Evaluator,
    ParameterSync,
    Trainer,
    check_dataset,
)
from chatlearn.engine.effects import check_effects
from chatlearn.engine.files import find_missing_data
from chatlearn.engine.planning import plan_flows, plan_run
from chatlearn.engine.state import current_config
from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chatlearn.config import Config
    from chatlearn.config.schema import DataSource
    from chatlearn.engine.planning import RunPlan
    from chatlearn.engine.result import RunResult
    from chatlearn.models.base import BaseModule

__all__ = ["Engine"]


class Engine:
    """An algorithm: what produces samples, what trains on them, what evaluates.

    Any of the three may be None. Without an environment the trainer trains on the data set's
    rows as they are; without a trainer `learn()` gives the rollouts back; an evaluator alone
    evaluates.

    Args:
        environment: produces the samples of an episode.
        trainer: trains on them.
        evaluator: runs over an evaluation data set now and then.
        name: shown in messages.
    """

    def __init__(
        self,
        environment: Environment | None = None,
        trainer: Trainer | None = None,
        evaluator: Evaluator | None = None,
        name: str = "alignment",
    ) -> None:
        self.name = name
        self.environment: Environment | None = None
        self.trainer: Trainer | None = None
        self.evaluator: Evaluator | None = None
        self.parameter_syncs: list[ParameterSync] = []
        self.sample_manager: Callable[[Sequence[Any]], list[dict[str, Any]]] | None = None
        self._datasets: tuple[Sequence[Any], ...] = ()
        self._eval_datasets: tuple[Sequence[Any], ...] = ()
        self.set_environment(environment).set_trainer(trainer).set_evaluator(evaluator)

    def set_environment(self, environment: Environment | None) -> Self:
        """Use this environment; its models come with it."""
        self.environment = _checked(environment, Environment)
        return self

    def set_trainer(self, trainer: Trainer | None) -> Self:
        """Use this trainer; its models come with it."""
        self.trainer = _checked(trainer, Trainer)
        return self

    def set_evaluator(self, evaluator: Evaluator | None) -> Self:
        """Use this evaluator; its models come with it."""
        self.evaluator = _checked(evaluator, Evaluator)
        return self

    def set_dataset(self, dataset: Sequence[Any]) -> Self:
        """Use one list of prompts, for the first of environment, trainer and evaluator there is."""
        return self.set_multiple_datasets([dataset])

    def set_multiple_datasets(self, datasets: Sequence[Sequence[Any]]) -> Self:
        """Use several lists of prompts, mixed by `runtime.data_ratio`."""
        for index, dataset in enumerate(datasets):
            check_dataset(dataset, f"data set {index}")
        self._datasets = tuple(datasets)
        return self

    def set_parameter_sync(self, src_model: BaseModule, dst_model: BaseModule) -> Self:
        """Give `dst_model` the weights of `src_model` at the start and after training.

        After the start this happens in every episode that `models.<dst>.sync_frequency` names.
        """
        self.parameter_syncs.append(ParameterSync(src_model, dst_model))
        return self

    def set_relay_sample_manager(
        self, manager: Callable[[Sequence[Any]], list[dict[str, Any]]]
    ) -> Self:
        """Let `manager` decide what is trained on, once an episode's samples are all there.

        It gets the last episodes (`runtime.max_relay_episode`) as `EpisodeRelayBuffer`s and
        gives the rows to train on.
        """
        self.sample_manager = manager
        return self

    @property
    def datasets(self) -> tuple[Sequence[Any], ...]:
        """The prompts to draw from: the engine's, else the environment's, else the trainer's."""
        if self._datasets:
            return self._datasets
        parts = (self.environment, self.trainer)
        return next((part.datasets for part in parts if part is not None and part.datasets), ())

    @property
    def eval_datasets(self) -> tuple[Sequence[Any], ...]:
        """The prompts to evaluate: the evaluator's; the engine's where it only evaluates."""
        own = self.evaluator.datasets if self.evaluator is not None else ()
        return own or self._eval_datasets or (() if self.datasets_needed else self._datasets)

    @property
    def datasets_needed(self) -> bool:
        """Whether there is something to roll out or train; otherwise it is all evaluation."""
        return self.environment is not None or self.trainer is not None

    def active_evaluator(self, config: Config) -> Evaluator | None:
        """The evaluator that a run with this configuration has; an optional one only with data."""
        evaluator = self.evaluator
        if evaluator is None or not evaluator.is_optional or not self.datasets_needed:
            return evaluator
        return evaluator if self.eval_datasets or config.runtime.eval_data_path else None

    def plan(
        self, config: Config, assume_devices: int | None = None, *, may_join: bool = True
    ) -> RunPlan:
        """Trace the flows and place the models, without starting a worker.

        Args:
            config: the resolved configuration.
            assume_devices: plan for this many GPUs instead of those that are there.
            may_join: join the cluster of `RAY_ADDRESS` to count its devices.

        Raises:
            ConfigError: the config and the flows do not fit together, or something that was set
                cannot have an effect.
            FlowError: a flow that cannot work.
        """
        evaluator, syncs = self.active_evaluator(config), tuple(self.parameter_syncs)
        flows = plan_flows(self.environment, self.trainer, evaluator, syncs)
        check_effects(self, config)
        return plan_run(flows, config, assume_devices, may_join=may_join)

    def learn(self) -> RunResult:
        """Run the episodes of the configuration; every worker is gone when this returns.

        Where no data set was set, `runtime.data_path` and `runtime.eval_data_path` are read.

        Raises:
            ConfigError: the configuration cannot work; nothing was started.
            DataError: there is no data set, or a file cannot be read.
            WorkerError: a worker raised or died.
            ChatLearnError: anything else that stops the run.
        """
        from chatlearn.engine.run import run_engine

        config = current_config()
        return run_engine(self._with_data(config), config)

    def _with_data(self, config: Config) -> Self:
        """A copy with the data of the config's paths where the program set none."""
        found, runtime = copy(self), config.runtime
        if runtime.eval_data_path and self.evaluator is not None and not self.evaluator.datasets:
            found._eval_datasets = _read_files("runtime.eval_data_path", runtime.eval_data_path)
        is_needed = self.datasets_needed or not found.eval_datasets
        if runtime.data_path and is_needed and not self.datasets:
            found._datasets = _read_files("runtime.data_path", runtime.data_path)
        return found


def _read_files(key: str, sources: Sequence[str | DataSource]) -> tuple[Sequence[Any], ...]:
    missing = find_missing_data(key, sources)
    if missing:
        raise ConfigError("\n  ".join(["files are missing:", *missing]))
    return tuple(
        read_prompts(source)
        if isinstance(source, str)
        else read_prompts(source.path, split=source.split, columns=source.columns)
        for source in sources
    )


def _checked(part: Any, kind: type) -> Any:
    if part is not None and not isinstance(part, kind):
        raise ConfigError(
            f"expected a chatlearn.{kind.__name__} or None, got {type(part).__name__}"
        )
    return part
