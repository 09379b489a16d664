"""Refuses what was set and cannot have an effect, before a worker starts. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlearn.data.relay import RelaySampleManager
from chatlearn.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chatlearn.config import Config, RuntimeConfig
    from chatlearn.engine.engine import Engine

__all__ = ["check_effects"]


def check_effects(engine: Engine, config: Config) -> None:
    """Look for settings of a run that nothing would heed.

    An engine of an evaluator alone may have the configuration of the training that it evaluates.

    Raises:
        ConfigError: lists them, a line each.
    """
    if not engine.datasets_needed:
        return
    problems = [*_check_evaluation(engine, config.runtime), *_check_relay(engine, config.runtime)]
    trainer = engine.trainer if engine.environment is not None else None
    if trainer is not None and trainer.datasets and trainer.datasets is not engine.datasets:
        problems.append(
            "Trainer.set_dataset: the trainer trains on the samples that the environment makes of "
            "another data set"
        )
    if problems:
        raise ConfigError("\n  ".join(["what is set here has no effect:", *problems]))


def _check_evaluation(engine: Engine, runtime: RuntimeConfig) -> Iterator[str]:
    evaluator = engine.evaluator
    if evaluator is None and runtime.eval_data_path:
        yield "runtime.eval_data_path: the engine has no evaluator: call set_evaluator"
    if evaluator is not None and (engine.eval_datasets or runtime.eval_data_path):
        return
    lacking = "an evaluator" if evaluator is None else "evaluation data"
    remedy = "set_evaluator(Evaluator(flow).set_dataset(prompts))"
    if evaluator is not None:
        remedy = "evaluator.set_dataset(prompts), or set runtime.eval_data_path"
    if runtime.enable_eval_before_training:
        yield f"runtime.enable_eval_before_training: the engine lacks {lacking}: call {remedy}"
    if runtime.eval_episode_interval:
        yield (
            f"runtime.eval_episode_interval={runtime.eval_episode_interval}: the engine lacks "
            f"{lacking}: call {remedy}"
        )


def _check_relay(engine: Engine, runtime: RuntimeConfig) -> Iterator[str]:
    kept, manager = runtime.max_relay_episode, engine.sample_manager
    keeps_past = kept < 0 or kept > 1
    if kept and manager is None:
        yield (
            f"runtime.max_relay_episode={kept}: there is no sample manager that takes the "
            "episodes: call set_relay_sample_manager"
        )
    elif keeps_past and isinstance(manager, RelaySampleManager) and not manager.uses_past_episodes:
        yield (
            f"runtime.max_relay_episode={kept}: {type(manager).__name__} trains on the newest "
            "episode only (it runs whatever this is set to)"
        )
    if runtime.relay_episode_offset and not keeps_past:
        yield (
            f"runtime.relay_episode_offset={runtime.relay_episode_offset}: no past episode is "
            f"kept with max_relay_episode={kept}"
        )
