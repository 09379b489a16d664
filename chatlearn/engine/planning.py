"""From an engine and a config to the plan of a run: graphs, models, placement. Pure: no workers."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatlearn.engine.completion import complete_config
from chatlearn.engine.files import find_missing_files
from chatlearn.errors import ConfigError, FlowError
from chatlearn.flow.graph import ROOT
from chatlearn.flow.trace import trace_flow
from chatlearn.runtime.devices import assume_inventory, discover_inventory
from chatlearn.runtime.placement import build_requests, check_local_sizes, plan_placement

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chatlearn.config import Config
    from chatlearn.engine.components import Environment, Evaluator, ParameterSync, Trainer
    from chatlearn.flow.graph import FlowGraph
    from chatlearn.flow.trace import TracedFlow
    from chatlearn.models.base import BaseModule
    from chatlearn.runtime.placement import ModelRequest, PlacementPlan

__all__ = ["FlowPlan", "RunPlan", "plan_flows", "plan_run", "synced_in_episode"]


@dataclass(frozen=True)
class FlowPlan:
    """The traced flows of an engine and the models in them.

    Attributes:
        environment: graph of the environment flow, if there is one.
        trainer: graph of the trainer flow, if there is one.
        evaluator: graph of the evaluation flow, if there is one.
        modules: every model by name, in order of first appearance.
        trainable: names of the models that the trainer flow trains.
        syncs: (source, destination) names of `set_parameter_sync`.
    """

    environment: FlowGraph | None
    trainer: FlowGraph | None
    evaluator: FlowGraph | None
    modules: Mapping[str, BaseModule]
    trainable: tuple[str, ...]
    syncs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class RunPlan:
    """Everything that is decided before a worker starts.

    Attributes:
        flows: the traced flows.
        requests: what each model asks for.
        placement: where each worker goes.
        config: the configuration, with what the models added to it.
        missing_files: a line for each tokenizer and checkpoint that is not there.
        notes: a line for each thing that a model wants its user to know.
    """

    flows: FlowPlan
    requests: tuple[ModelRequest, ...]
    placement: PlacementPlan
    config: Config
    missing_files: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def plan_flows(
    environment: Environment | None,
    trainer: Trainer | None,
    evaluator: Evaluator | None,
    syncs: Sequence[ParameterSync],
) -> FlowPlan:
    """Trace the flows and collect the models.

    Raises:
        ConfigError: no flow at all, a sync with a model that is in no flow, or two syncs to one
            model.
        FlowError: a flow that cannot work; names its line.
    """
    if environment is None and trainer is None and evaluator is None:
        raise ConfigError("the engine has no flow: give an environment, a trainer or an evaluator")
    modules: dict[str, BaseModule] = {}
    graphs: list[FlowGraph | None] = []
    parts = (("environment", environment), ("trainer", trainer), ("evaluator", evaluator))
    for name, part in parts:
        traced = trace_flow(part.model_flow, name=name) if part is not None else None
        graphs.append(traced.graph if traced is not None else None)
        if traced is not None:
            _add_modules(modules, traced)
    for pair in syncs:
        for module in (pair.source, pair.destination):
            if modules.get(module.name) is not module:
                raise ConfigError(
                    f"set_parameter_sync names model {module.name!r}, which no flow calls; "
                    f"the flows call {', '.join(modules)}"
                )
    _check_sync_destinations(syncs)
    env_graph, train_graph, eval_graph = graphs
    _check_train_calls(env_graph, eval_graph, train_graph)
    if env_graph is not None and train_graph is not None and not env_graph.outputs:
        raise FlowError("the environment flow returns nothing: return what the trainer trains on")
    if eval_graph is not None and not eval_graph.outputs:
        raise FlowError("the evaluation flow returns nothing: return what shall be looked at")
    return FlowPlan(
        env_graph,
        train_graph,
        eval_graph,
        modules,
        _trained_models(train_graph),
        tuple((pair.source.name, pair.destination.name) for pair in syncs),
    )


def plan_run(
    flows: FlowPlan, config: Config, assume_devices: int | None = None, *, may_join: bool = True
) -> RunPlan:
    """Layouts and placement of the flows' models.

    Args:
        flows: the traced flows.
        config: the resolved configuration.
        assume_devices: plan for this many GPUs instead of those that are there.
        may_join: join the cluster of `RAY_ADDRESS` to count its devices.

    Raises:
        ConfigError: the config names a model that no flow calls, or sizes do not add up.
        PlacementError: the models do not fit on the devices.
    """
    _check_model_names(flows, config)
    completed = complete_config(config, flows.modules)
    config = completed.config
    trainable = set(flows.trainable)
    for name in flows.modules:
        if config.model(name).trainable and name not in trainable:
            trainable.add(name)
    requests = build_requests(config, tuple(flows.modules), tuple(sorted(trainable)))
    _check_modules(flows, requests, config)
    if config.runtime.backend == "local":
        check_local_sizes({request.model_name: request.num_ranks for request in requests})
    if assume_devices is None:
        inventory = discover_inventory(config, may_join=may_join)
    else:
        inventory = assume_inventory(config, assume_devices)
    colocation, notes = config.runtime.colocation_groups, completed.notes
    if config.runtime.backend == "local" and inventory.kind == "gpu":
        if colocation:
            notes = (*notes, "runtime.colocation: with runtime.backend: local all share one device")
        # They live in one process, on its device.
        colocation = (tuple(flows.modules),)
    placement = plan_placement(requests, colocation, inventory)
    missing = find_missing_files(config, flows.modules)
    return RunPlan(flows, requests, placement, config, missing, notes)


def synced_in_episode(episode: int | None, frequency: int) -> bool:
    """Whether a destination gets new weights after an episode; None: before the first."""
    if episode is None:
        return True
    return frequency > 0 and (episode + 1) % frequency == 0


def _check_modules(flows: FlowPlan, requests: Sequence[ModelRequest], config: Config) -> None:
    """Let every module say what it cannot be."""
    problems = [
        f"models.{request.model_name}: {problem}"
        for request in requests
        for problem in flows.modules[request.model_name].find_problems(
            config.model(request.model_name), request.layout
        )
    ]
    if problems:
        raise ConfigError("\n  ".join(["the models cannot be built:", *problems]))


def _check_model_names(flows: FlowPlan, config: Config) -> None:
    """A configured model that no flow calls is fine, unless its name looks like a slip."""
    unconfigured = [name for name in flows.modules if name not in config.models]
    for name in config.models:
        close = difflib.get_close_matches(name, unconfigured, n=1)
        if name not in flows.modules and close:
            raise ConfigError(
                f"models.{name}: no flow calls a model of that name; did you mean {close[0]!r}? "
                f"The flows call {', '.join(flows.modules)}"
            )


def _check_sync_destinations(syncs: Sequence[ParameterSync]) -> None:
    sources: dict[str, str] = {}
    for pair in syncs:
        source, destination = pair.source.name, pair.destination.name
        if destination in sources:
            raise ConfigError(
                f"set_parameter_sync gives {destination!r} the weights of "
                f"{sources[destination]!r} and of {source!r}: a model takes its weights from one"
            )
        sources[destination] = source


def _add_modules(modules: dict[str, BaseModule], traced: TracedFlow) -> None:
    for name, module in traced.modules.items():
        if modules.setdefault(name, module) is not module:
            raise FlowError(
                f"two different models are called {name!r}: give each model a name of its own"
            )


def _trained_models(graph: FlowGraph | None) -> tuple[str, ...]:
    if graph is None:
        return ()
    trained = [node.model_name for node in graph.nodes if node.method_name == "train_step"]
    if not trained:
        raise FlowError("the trainer flow calls no train_step: call it on at least one model")
    return tuple(dict.fromkeys(trained))


def _check_train_calls(
    environment: FlowGraph | None, evaluator: FlowGraph | None, trainer: FlowGraph | None
) -> None:
    for graph in filter(None, (environment, evaluator)):
        for node in graph.nodes:
            if node.method_name == "train_step":
                raise FlowError(
                    f"{node.line}: train_step belongs in the trainer flow, not in the {graph.name}"
                )
    if trainer is None:
        return
    for node in trainer.nodes:
        taken = [trainer.nodes[index] for index in node.inputs if index != ROOT]
        if any(source.method_name == "train_step" for source in taken):
            raise FlowError(
                f"{node.line}: takes the result of train_step, which gives metrics, not rows; "
                "use ControlDependencies to order the two calls"
            )
