"""An episode whose mean reward has collapsed, written down and looked at again.

A dump is a folder `dumps/rewards-<number>` of the run: all samples of the episode, a record with
the best mean reward before, and the config. The folder appears as a whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from chatlearn.checkpoint.plain_values import load_plain, save_plain
from chatlearn.config import load_config
from chatlearn.engine.replayed import Replay
from chatlearn.errors import ChatLearnError, CheckpointError, in_one_line
from chatlearn.flow.step_dump import RECORD_FILE
from chatlearn.metrics.means import mean_of_numbers
from chatlearn.models.faults import find_reward_fault

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chatlearn.config.guards import GuardsConfig
    from chatlearn.models.faults import NumericFault

__all__ = ["KIND", "Collapse", "dump_rewards", "replay_rewards"]

logger = logging.getLogger(__name__)

KIND = "rewards"
_ROWS_FILE = "samples.pt"


@dataclass(frozen=True)
class Collapse:
    """An episode whose reward has collapsed.

    Attributes:
        fault: what is wrong.
        episode: counted from 1.
        best: largest mean reward of an episode before.
    """

    fault: NumericFault
    episode: int
    best: float


def dump_rewards(
    run_dir: Path, guards: GuardsConfig, collapse: Collapse, rows: Sequence[Mapping[str, Any]]
) -> Path | None:
    """Write a dump; None where there are enough of them, or it cannot be written.

    Args:
        run_dir: the run's folder.
        guards: the limits.
        collapse: why.
        rows: the episode's samples.
    """
    dumps, fault = run_dir / "dumps", collapse.fault
    number = 1 + len(list(dumps.glob(f"{KIND}-*")))
    if not guards.dump or number > guards.max_dumps:
        return None
    folder = dumps / f"{KIND}-{number}"
    draft = folder.with_name(f".{folder.name}.partial")
    record = {
        "format": 1,
        "kind": KIND,
        "episode": collapse.episode,
        "best": collapse.best,
        "fault": {"name": fault.name, "value": repr(fault.value), "text": fault.text},
    }
    try:
        draft.mkdir(parents=True, exist_ok=True)
        content = [dict(row) for row in rows]
        save_plain(draft / _ROWS_FILE, content, f"a sample of episode {collapse.episode}")
        (draft / RECORD_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")
        shutil.copyfile(run_dir / "config.yaml", draft / "config.yaml")
        os.replace(draft, folder)
    except (OSError, ChatLearnError) as error:
        logger.warning("the episode's samples cannot be dumped: %s", in_one_line(error))
        shutil.rmtree(draft, ignore_errors=True)
        return None
    return folder


def replay_rewards(folder: Path, record: Mapping[str, Any], overrides: Sequence[str]) -> Replay:
    """Measure the samples of a dump again, by the limits of its config or others.

    Args:
        folder: of the dump.
        record: its record.
        overrides: `key.path=value` entries for its configuration.

    Raises:
        CheckpointError: a file is damaged.
    """
    guards = load_config(folder / "config.yaml", overrides).runtime.guards
    path = folder / _ROWS_FILE
    try:
        rows = cast("list[Mapping[str, Any]]", load_plain(path))
        rewards = [float(row["rewards"]) for row in rows]
        best, then = float(record["best"]), float(record["fault"]["value"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not what an episode's samples are: {error}") from error
    reward = mean_of_numbers(rewards)
    fault = find_reward_fault(guards, reward, best)
    metrics = {"samples": float(len(rows)), "best before": best}
    if reward is not None:
        metrics |= {"reward": reward, "lowest": min(rewards), "highest": max(rewards)}
    metrics |= _mean_lengths(rows)
    return Replay(
        f"episode {record['episode']}",
        str(record["fault"]["text"]),
        "reward",
        then,
        metrics,
        fault.text if fault is not None and fault.action == "stop" else "",
        is_exact=True,
        warnings=(fault.text,) if fault is not None and fault.action != "stop" else (),
        is_again=fault is not None,
    )


def _mean_lengths(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    lengths = [len(row["response_token_ids"]) for row in rows if "response_token_ids" in row]
    return {"response length": sum(lengths) / len(lengths)} if lengths else {}
