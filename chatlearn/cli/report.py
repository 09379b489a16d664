"""What `chatlearn check` prints: graphs, models, placement and weight sync as tables."""

from __future__ import annotations

import os
from dataclasses import astuple
from itertools import groupby
from typing import TYPE_CHECKING

from rich.console import Console

from chatlearn.cli.parameter_count import count_parameters, parameter_bytes
from chatlearn.cli.planned_config import planned_config
from chatlearn.cli.tables import print_table
from chatlearn.engine.files import find_missing_data
from chatlearn.flow.graph import describe_graph
from chatlearn.runtime.placement import describe_placement

if TYPE_CHECKING:
    from chatlearn.config import Config, ModelConfig
    from chatlearn.engine.engine import Engine
    from chatlearn.engine.planning import RunPlan
    from chatlearn.flow.graph import FlowGraph
    from chatlearn.models.base import BaseModule
    from chatlearn.parallel.layout import ParallelLayout
    from chatlearn.runtime.placement import ModelRequest, PlacementPlan

__all__ = ["print_plan"]


def print_plan(
    engine: Engine, plan: RunPlan, config: Config, console: Console | None = None
) -> None:
    """Print everything that is decided before a worker starts.

    Args:
        engine: what runs.
        plan: its plan.
        config: the resolved configuration.
        console: where to; None: standard output, plain where that is no terminal.
    """
    if console is None:
        console = Console(highlight=False)
    flows, placement = plan.flows, plan.placement
    console.print(f"engine {engine.name}, backend {config.runtime.backend}", markup=False)
    for graph in filter(None, (flows.environment, flows.trainer, flows.evaluator)):
        header = ("call", "inputs", "waits for", "returned", "line")
        print_table(console, f"{graph.name} flow", header, _graph_rows(graph))
    header = ("model", "module", "TP", "PP", "VPP", "CP", "DP", "replicas", "ranks", "on", "size")
    rows = [_model_row(plan, request, config) for request in plan.requests]
    print_table(console, "models", header, rows)
    kind = "GPUs" if placement.device_kind == "gpu" else "logical devices"
    title = f"placement on {placement.num_nodes} x {placement.devices_per_node} {kind}"
    header = ("group", "model", "replica", "ranks", "node:device")
    rows = [tuple(map(str, astuple(row))) for row in describe_placement(placement)]
    print_table(console, title, header, rows)
    header = ("node", "devices", "models")
    print_table(console, "devices", header, _device_rows(placement))
    _print_syncs(console, plan, config)
    if plan.notes:
        print_table(console, "what follows from files", ("note",), [(n,) for n in plan.notes])
    runtime = config.runtime
    missing = find_missing_data("runtime.data_path", runtime.data_path)
    missing += find_missing_data("runtime.eval_data_path", runtime.eval_data_path)
    missing += plan.missing_files
    if missing:
        print_table(console, "files that a run needs", ("missing",), [(line,) for line in missing])
    found = f"; {len(missing)} files are missing" if missing else ""
    console.print(f"ok: nothing was started{found}", markup=False)


def _graph_rows(graph: FlowGraph) -> list[tuple[str, ...]]:
    return [
        (c.call, c.inputs, c.waits_for, "yes" if c.is_returned else "", _shorten(node.line))
        for c, node in zip(describe_graph(graph), graph.nodes, strict=True)
    ]


def _shorten(line: str) -> str:
    """`file:line` of `file:line: source`, with the file relative to the working directory."""
    where = line.split(": ", 1)[0]
    return where.removeprefix(os.getcwd() + os.sep)


def _model_row(plan: RunPlan, request: ModelRequest, config: Config) -> tuple[str, ...]:
    module = plan.flows.modules[request.model_name]
    layout = request.layout
    path = config.model(request.model_name).module or type(module).__qualname__
    sizes = (layout.tp_size, layout.pp_size, layout.vpp_size, layout.cp_size, layout.dp_size)
    where = f"{request.num_ranks * request.cpus_per_rank} CPUs"
    if not request.is_cpu_only:
        where = f"{request.num_ranks} devices"
    size = _describe_size(module, planned_config(plan, config, request.model_name))
    counts = (*sizes, request.num_replicas, request.num_ranks)
    return (request.model_name, path, *map(str, counts), where, size)


def _device_rows(placement: PlacementPlan) -> list[tuple[str, ...]]:
    """Which models stand on which devices; devices side by side with the same models in one."""
    on: dict[tuple[int, int], list[str]] = {}
    for place in placement.places:
        if place.slot is not None:
            names = on.setdefault((place.slot.node, place.slot.device), [])
            names.append(place.model_name)
    rows: list[tuple[str, ...]] = []
    slots = sorted(on)
    # Devices side by side keep the same distance from their position in the list.
    runs = groupby(
        enumerate(slots), key=lambda at: (at[1][0], ", ".join(on[at[1]]), at[1][1] - at[0])
    )
    for (node, models, _), run in runs:
        devices = [device for _, (_, device) in run]
        shown = str(devices[0]) if len(devices) == 1 else f"{devices[0]}-{devices[-1]}"
        rows.append((str(node), shown, models))
    cpu_only = dict.fromkeys(p.model_name for p in placement.places if p.slot is None)
    rows.extend(("any", "CPU", name) for name in cpu_only)
    return rows


def _print_syncs(console: Console, plan: RunPlan, config: Config) -> None:
    by_name = {request.model_name: request for request in plan.requests}
    rows: list[tuple[str, ...]] = []
    for source_name, destination_name in plan.flows.syncs:
        source, destination = by_name[source_name], by_name[destination_name]
        size, received = (
            _describe_size(plan.flows.modules[name], planned_config(plan, config, name))
            for name in (source_name, destination_name)
        )
        frequency = config.model(destination_name).sync_frequency
        rows.append(
            (
                f"{source_name} -> {destination_name}",
                f"{_describe_layout(source.layout)} -> {_describe_layout(destination.layout)}",
                f"{source.num_ranks} -> {destination.num_ranks}",
                str(destination.num_replicas),
                size if size == received else f"{size} -> {received}: they differ",
                _describe_frequency(frequency),
            )
        )
    if rows:
        header = ("models", "layouts", "ranks", "replicas", "size of one replica", "when")
        print_table(console, "weight sync", header, rows)


def _describe_frequency(frequency: int) -> str:
    if frequency == 0:
        return "at the start"
    return "every episode" if frequency == 1 else f"every {frequency} episodes"


def _describe_layout(layout: ParallelLayout) -> str:
    sizes = (
        ("TP", layout.tp_size),
        ("PP", layout.pp_size),
        ("VPP", layout.vpp_size),
        ("CP", layout.cp_size),
        ("EP", layout.ep_size),
        ("DP", layout.dp_size),
    )
    return " ".join(f"{name}{size}" for name, size in sizes if size > 1) or "one rank"


def _describe_size(module: BaseModule, config: ModelConfig) -> str:
    """Parameters and bytes of one whole copy of a Megatron model, else `unknown`."""
    fields = config.megatron
    # Only Megatron modules say which head they have; any other may build what it likes.
    head = getattr(module, "head", None)
    count = count_parameters(fields, has_scalar_head=head == "scalar") if head else None
    if count is None:
        return "unknown"
    num_bytes = count * parameter_bytes(fields)
    return f"{_scaled(count)} parameters, {_scaled(num_bytes)}B"


def _scaled(count: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} "
