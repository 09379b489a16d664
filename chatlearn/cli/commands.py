"""The commands behind the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from chatlearn.config import load_config
from chatlearn.engine.engine import Engine
from chatlearn.engine.from_config import build_engine
from chatlearn.engine.state import init
from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    import argparse

__all__ = ["run_check", "run_eval", "run_plan", "run_train"]


def run_train(arguments: argparse.Namespace) -> None:
    """`chatlearn train CONFIG [key.path=value ...]`."""
    config = init(arguments.config, arguments.overrides)
    result = build_engine(config).learn()
    sys.stdout.write(f"run folder: {result.run_dir}\n")


def run_eval(arguments: argparse.Namespace) -> None:
    """`chatlearn eval CONFIG`: the evaluation of the config's engine, without training."""
    config = init(arguments.config, arguments.overrides)
    engine = build_engine(config)
    if engine.evaluator is None:
        raise ConfigError(f"engine {engine.name!r} has no evaluator: nothing to evaluate")
    evaluation = Engine(None, None, engine.evaluator, name="eval")
    if not engine.evaluator.datasets:
        evaluation.set_multiple_datasets(engine.datasets)
    result = evaluation.learn()
    for name, value in sorted((result.metrics[-1] if result.metrics else {}).items()):
        sys.stdout.write(f"{name}: {value:g}\n")
    sys.stdout.write(f"run folder: {result.run_dir}\n")


def run_check(arguments: argparse.Namespace) -> None:
    """`chatlearn check CONFIG`: everything that can be known without starting a worker."""
    from chatlearn.cli.planned_syncs import check_syncs
    from chatlearn.cli.report import print_plan

    config = load_config(Path(arguments.config), arguments.overrides)
    engine = build_engine(config)
    plan = engine.plan(config, arguments.assume_devices, may_join=False)
    check_syncs(plan, plan.config)
    print_plan(engine, plan, plan.config)


def run_plan(arguments: argparse.Namespace) -> None:
    """`chatlearn plan CONFIG`: the weight syncs in full, simulated on a stated cluster."""
    from chatlearn.cli.sync_report import choose_speeds, print_sync_plans

    config = load_config(Path(arguments.config), arguments.overrides)
    engine = build_engine(config)
    plan = engine.plan(config, arguments.assume_devices, may_join=False)
    speeds = choose_speeds(
        is_gpu=plan.placement.device_kind == "gpu",
        node_gb_s=arguments.node_gb_s,
        network_gb_s=arguments.network_gb_s,
        latency_us=arguments.latency_us,
    )
    print_sync_plans(plan, plan.config, speeds, as_json=arguments.json)
