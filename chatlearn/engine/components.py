"""What users hand to an engine: flows with their data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Self, cast

from chatlearn.errors import ConfigError, DataError
from chatlearn.metrics.means import mean_of_numbers

if TYPE_CHECKING:
    from collections.abc import Callable

    from chatlearn.models.base import BaseModule

__all__ = ["Environment", "Evaluator", "ParameterSync", "Trainer"]


class _Component:
    """A flow and the prompts that go through it."""

    def __init__(self, model_flow: Callable[[Any], Any]) -> None:
        if not callable(model_flow):
            raise ConfigError(
                f"{type(self).__name__} takes a flow function of one argument, got "
                f"{type(model_flow).__name__}"
            )
        self.model_flow = model_flow
        self.datasets: tuple[Sequence[Any], ...] = ()

    def set_dataset(self, dataset: Sequence[Any]) -> Self:
        """Use one list of prompts (mappings, texts or anything `build_dataset` takes)."""
        return self.set_multiple_datasets([dataset])

    def set_multiple_datasets(self, datasets: Sequence[Sequence[Any]]) -> Self:
        """Use several data sets, mixed by `runtime.data_ratio`.

        Raises:
            DataError: one of them is not a list of prompts, or is empty.
        """
        for index, dataset in enumerate(datasets):
            check_dataset(dataset, f"{type(self).__name__} data set {index}")
        self.datasets = tuple(datasets)
        return self


class Environment(_Component):
    """N inference models turn prompts into the samples of an episode."""


class Trainer(_Component):
    """M models train on the samples."""


class Evaluator(_Component):
    """K models run over an evaluation data set, each row once.

    Override `post_process` to compute metrics of your own.

    Attributes:
        is_optional: where there is no evaluation data the flow is not looked at, so its models
            need none of its methods; otherwise that is worth a warning.
    """

    is_optional: bool = False

    def post_process(
        self, results: Mapping[str, list[dict[str, Any]]], eval_info: Mapping[str, int]
    ) -> Mapping[str, float]:
        """Metrics of one evaluation.

        Args:
            results: for each returned model, one dict per row in data-set order.
            eval_info: `episode_iteration` and `train_iteration` of the weights.

        Returns:
            Numbers by name; logged under `eval/`. The default: the mean of `rewards`, if any.
        """
        metrics: dict[str, float] = {}
        for rows in results.values():
            reward = mean_of_numbers(row["rewards"] for row in rows if "rewards" in row)
            if reward is not None:
                metrics["reward"] = reward
        return metrics


class ParameterSync:
    """One pair of `set_parameter_sync`: the weights of `source` go to `destination`."""

    def __init__(self, source: BaseModule, destination: BaseModule) -> None:
        if source is destination:
            raise ConfigError(f"parameter sync from {source.name!r} to itself")
        self.source = source
        self.destination = destination


def check_dataset(dataset: object, name: str) -> None:
    """Refuse what is not a non-empty sequence of prompts."""
    if isinstance(dataset, str | bytes | Mapping) or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"{name}: expected a list of prompts, got {type(cast('object', dataset)).__name__}"
        )
    if not isinstance(dataset, Sized) or len(dataset) == 0:
        raise DataError(f"{name} is empty: give at least one prompt")
