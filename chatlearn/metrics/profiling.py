"""Kernel timelines of a worker's stages, and the operators that took the time.

One `StageProfiler` lives in a worker while an episode is profiled. Each call of a stage has a
torch profiler of its own, so that models that share a process do not meet.
"""

from __future__ import annotations

import json
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

__all__ = ["OperatorTime", "StageProfile", "StageProfiler", "format_profiles"]

_SHOWN_OPERATORS = 12
_KEPT_OPERATORS = 200


@dataclass(frozen=True)
class OperatorTime:
    """One operator within a stage: its calls, and its own seconds without those it calls."""

    name: str
    num_calls: int
    cpu_s: float
    device_s: float

    @property
    def seconds(self) -> float:
        """On the device where it ran there, else on the CPU."""
        return self.device_s or self.cpu_s


@dataclass(frozen=True)
class StageProfile:
    """What one worker did in one stage.

    Attributes:
        stage: the method.
        num_calls: of the stage.
        seconds: within the method, all calls together.
        num_tokens: of the calls' rows; 0 on ranks whose output does not count.
        operators: the costliest, by their own time.
    """

    stage: str
    num_calls: int
    seconds: float
    num_tokens: int
    operators: tuple[OperatorTime, ...]


@dataclass
class _Call:
    stage: str
    profile: Any
    seconds: float = 0.0
    num_tokens: int = 0


class StageProfiler:
    """Profiles the calls of one worker.

    Args:
        has_gpu: the model lives on a GPU.
    """

    def __init__(self, *, has_gpu: bool) -> None:
        self._has_gpu = has_gpu
        self._calls: list[_Call] = []

    @contextmanager
    def record(self, stage: str) -> Generator[None]:
        """Profile one call of a stage."""
        import torch.profiler as torch_profiler

        kinds: Any = torch_profiler.ProfilerActivity
        activities = [kinds.CPU, kinds.CUDA] if self._has_gpu else [kinds.CPU]
        profile: Any = torch_profiler.profile(activities=activities)
        call = _Call(stage, profile)
        profile.start()
        start_s = time.perf_counter()
        try:
            yield
        finally:
            call.seconds = time.perf_counter() - start_s
            profile.stop()
            self._calls.append(call)

    def add_tokens(self, count: int) -> None:
        """Tokens of the last call's rows."""
        self._calls[-1].num_tokens += count

    def finish(self, path: Path) -> tuple[StageProfile, ...]:
        """Write the Chrome trace and sum up by stage; times in the trace count from the epoch."""
        events: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            for call in self._calls:
                part = Path(folder) / "trace.json"
                call.profile.export_chrome_trace(str(part))
                events.extend(_read_events(part))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": events}), encoding="utf-8")
        stages = dict.fromkeys(call.stage for call in self._calls)
        profiles = tuple(
            _summarize(stage, [call for call in self._calls if call.stage == stage])
            for stage in stages
        )
        self._calls = []
        return profiles


def format_profiles(workers: Mapping[str, Sequence[Sequence[StageProfile]]]) -> str:
    """A page on what each model's stages did.

    Args:
        workers: for each model the profiles of its ranks.
    """
    parts: list[str] = []
    for model_name, ranks in workers.items():
        stages = dict.fromkeys(profile.stage for rank in ranks for profile in rank)
        for stage in stages:
            own = [profile for rank in ranks for profile in rank if profile.stage == stage]
            parts.append(_format_stage(f"{model_name}.{stage}", own))
    return "\n".join(parts)


def _format_stage(name: str, ranks: Sequence[StageProfile]) -> str:
    seconds = max(profile.seconds for profile in ranks)
    tokens = sum(profile.num_tokens for profile in ranks)
    calls = sum(profile.num_calls for profile in ranks)
    head = f"{name}: {seconds:.3f} s on the longest of {len(ranks)} ranks, {calls} calls"
    if tokens and seconds > 0:
        head += f", {tokens} tokens, {tokens / seconds:.0f} tokens/s"
    lines = [head, f"  {'own s':>9} {'share':>6} {'calls':>8}  operator (all ranks together)"]
    operators = _add_up(operator for profile in ranks for operator in profile.operators)
    total = sum(operator.seconds for operator in operators) or 1.0
    lines += [
        f"  {each.seconds:9.4f} {100 * each.seconds / total:5.1f}% {each.num_calls:8d}  {each.name}"
        for each in operators[:_SHOWN_OPERATORS]
    ]
    return "\n".join([*lines, ""])


def _add_up(operators: Any) -> list[OperatorTime]:
    """By name, the costliest first."""
    found: dict[str, OperatorTime] = {}
    for each in operators:
        known = found.get(each.name, OperatorTime(each.name, 0, 0.0, 0.0))
        found[each.name] = OperatorTime(
            each.name,
            known.num_calls + each.num_calls,
            known.cpu_s + each.cpu_s,
            known.device_s + each.device_s,
        )
    return sorted(found.values(), key=lambda each: (-each.seconds, each.name))


def _summarize(stage: str, calls: Sequence[_Call]) -> StageProfile:
    operators = _add_up(
        OperatorTime(
            str(entry.key),
            int(entry.count),
            entry.self_cpu_time_total / 1e6,
            entry.self_device_time_total / 1e6,
        )
        for call in calls
        for entry in call.profile.key_averages()
    )
    seconds, tokens = sum(c.seconds for c in calls), sum(c.num_tokens for c in calls)
    return StageProfile(stage, len(calls), seconds, tokens, tuple(operators[:_KEPT_OPERATORS]))


def _read_events(path: Path) -> list[dict[str, Any]]:
    """The events of one trace, in microseconds since the epoch as in `timeline.json`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    base = content.get("baseTimeNanoseconds", 0) / 1e3
    events: list[dict[str, Any]] = content["traceEvents"]
    for event in events:
        if "ts" in event:
            event["ts"] += base
    return events
