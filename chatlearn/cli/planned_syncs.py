"""Both sides of each weight sync as a config describes them, before any worker is up."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from chatlearn.cli.planned_config import planned_config
from chatlearn.errors import ConfigError, SyncError
from chatlearn.sync.forecast import PlannedModel, check_models

if TYPE_CHECKING:
    from collections.abc import Generator

    from chatlearn.config import Config
    from chatlearn.engine.planning import RunPlan

__all__ = ["check_syncs", "describe_sides", "naming_pair"]

Pair = tuple[str, str]


def check_syncs(plan: RunPlan, config: Config) -> None:
    """Refuse a sync of two models that do not fit, where the config says what they hold.

    Raises:
        ConfigError: names the pair and the tensor.
    """
    for pair in plan.flows.syncs:
        try:
            sides = describe_sides(pair, plan, config)
        except ConfigError:
            # What only the live modules know is checked by the first sync.
            continue
        if not isinstance(sides, str):
            with naming_pair(pair):
                check_models(*sides)


def describe_sides(
    pair: Pair, plan: RunPlan, config: Config
) -> tuple[PlannedModel, PlannedModel] | str:
    """Source and destination of a sync, or why the config does not tell what they hold.

    Raises:
        ConfigError: a layout cannot hold its model, or only the live model knows.
    """
    source, destination = (plan.flows.modules[name] for name in pair)
    if source.weight_naming != destination.weight_naming:
        return "their names differ: planned when the workers run"
    sides: list[PlannedModel] = []
    by_name = {request.model_name: request for request in plan.requests}
    for name, module in zip(pair, (source, destination), strict=True):
        request = by_name[name]
        found = module.planned_weight_shards(planned_config(plan, config, name), request.layout)
        if found is None:
            return f"what {name} holds is known when its workers run"
        sides.append(PlannedModel(name, found, request.num_replicas, module.left_out_weights))
    return sides[0], sides[1]


@contextmanager
def naming_pair(pair: Pair) -> Generator[None]:
    """Say which sync an error is about."""
    try:
        yield
    except SyncError as error:
        raise ConfigError(f"weight sync {pair[0]} -> {pair[1]}: {error}") from error
