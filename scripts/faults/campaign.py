"""One run with faults on a schedule, watched from outside, and compared with an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatlearn.checkpoint.folders import find_checkpoints, find_damage
from scripts.faults.traces import MARK, await_silence, kill_marked
from scripts.faults.workload import read_account, read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Campaign", "Fault", "Outcome", "run_undisturbed"]

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.05
_SILENCE_S = 120.0


@dataclass(frozen=True)
class Fault:
    """What shall happen: `kind` to the first rank of `model` that comes to `stage`."""

    kind: str
    model: str
    stage: str


@dataclass
class Outcome:
    """What became of a fault.

    Attributes:
        fault: kind of fault.
        model: who suffered.
        stage: when.
        outcome: `replaced`, `rolled back`, `resumed`, `waited` or what went wrong.
        recovery_s: from the fault until the run went on.
        survived: whether it did.
    """

    fault: str
    model: str
    stage: str
    outcome: str = "did not happen"
    recovery_s: float = 0.0
    survived: bool = False


@dataclass
class Driver:
    """The driver's process and what it says."""

    process: subprocess.Popen[bytes]
    log: Path
    started_s: float = field(default_factory=time.monotonic)


class Campaign:
    """One run and its faults.

    Args:
        folder: of the workload.
        config: its config file.
        mark: tells its processes from others.
        environment: further environment variables.
        limit_s: of one fault, and of the run's end.
        actions: kinds of faults that are not the modules' business, by name.
    """

    def __init__(
        self,
        folder: Path,
        config: Path,
        mark: str,
        environment: Mapping[str, str] | None = None,
        limit_s: float = 150.0,
        actions: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        self._folder = folder
        self._config = config
        self._mark = mark
        self._environment = environment or {}
        self._limit_s = limit_s
        self._actions = actions or {}
        self._num_drivers = 0

    def run(self, faults: Sequence[Fault]) -> list[Outcome]:
        """Let the faults happen, one after another, and the run end."""
        outcomes: list[Outcome] = []
        driver = self._start_driver()
        try:
            self._await_progress(driver, self._limit_s)
            for fault in faults:
                outcome = Outcome(fault.kind, fault.model, fault.stage)
                outcomes.append(outcome)
                driver = self._suffer(driver, fault, outcome)
                if driver.process.poll() is not None:
                    break
            code = driver.process.wait(self._limit_s + 60.0)
            if code != 0 and outcomes:
                outcomes[-1].survived = False
                outcomes[-1].outcome += f"; the run ended with {code}: {_last_line(driver.log)}"
        except subprocess.TimeoutExpired:
            outcomes[-1].survived = False
            outcomes[-1].outcome += "; the run did not end"
        finally:
            driver.process.kill()
            driver.process.wait()
        return outcomes

    def run_alone(self) -> str:
        """Let nothing happen; gives what went wrong, or nothing."""
        driver = self._start_driver()
        try:
            code = driver.process.wait(self._limit_s)
        except subprocess.TimeoutExpired:
            return f"did not end within {self._limit_s:g} s"
        finally:
            driver.process.kill()
            driver.process.wait()
        return f"ended with {code}: {_last_line(driver.log)}" if code else ""

    def find_leftovers(self) -> list[str]:
        """What the run has left that it should not have: processes, and bad checkpoints."""
        left = await_silence(self._mark, _SILENCE_S)
        if left:
            kill_marked(self._mark)
        for folder in (self._folder / "runs" / "soak").glob("*/checkpoints"):
            for path in find_checkpoints(folder):
                damage = find_damage(path)
                if damage is not None:
                    left.append(damage)
        return left

    def account(self) -> dict[str, Any]:
        """What must be the same as in the undisturbed run."""
        return {"trained": read_account(self._folder), "metrics": read_metrics(self._folder)}

    def _suffer(self, driver: Driver, fault: Fault, outcome: Outcome) -> Driver:
        moments = self._folder / "moments"
        num_before, episode = self._num_recoveries(), self._num_episodes()
        start_s = time.monotonic()
        action = self._actions.get(fault.kind)
        if action is not None:
            action()
        else:
            (moments / "driver.pid").write_text(str(driver.process.pid), encoding="utf-8")
            moment = moments / f"{fault.model}.{fault.stage}"
            draft = moments / "draft"
            draft.write_text(fault.kind, encoding="utf-8")
            draft.rename(moment)
            if not self._await(lambda: not moment.exists(), driver):
                moment.unlink(missing_ok=True)
                return driver
            start_s = time.monotonic()
        if fault.kind == "driver":
            driver.process.wait(30.0)
            # Ray's processes notice that their driver is gone; its agents take a minute for that.
            driver = self._start_driver()
            self._await_progress(driver, self._limit_s)
            outcome.survived = driver.process.poll() is None or driver.process.returncode == 0
            outcome.outcome = "resumed" if outcome.survived else "not resumed"
        elif fault.kind == "pause":
            self._await(lambda: self._num_episodes() > episode, driver)
            outcome.survived = self._num_recoveries() == num_before
            outcome.outcome = "waited" if outcome.survived else "taken for dead"
        else:
            self._await(lambda: self._num_recoveries() > num_before, driver)
            found = self._recoveries()[num_before:]
            outcome.survived = bool(found)
            kinds = {"in_place": "replaced", "roll_back": "rolled back"}
            outcome.outcome = ", ".join(kinds[each["kind"]] for each in found) or "not noticed"
        outcome.recovery_s = round(time.monotonic() - start_s, 2)
        return driver

    def _start_driver(self) -> Driver:
        self._num_drivers += 1
        log = self._folder / f"driver-{self._num_drivers}.log"
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            MARK: self._mark,
            "PYTHONPATH": str(ROOT),
            **self._environment,
        }
        command = [sys.executable, "-m", "chatlearn.cli.main", "train", str(self._config)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "runtime.resume=auto"],
                cwd=self._folder,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return Driver(process, log)

    def _await_progress(self, driver: Driver, limit_s: float) -> None:
        """Until this driver has finished an episode."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and driver.process.poll() is None:
            if b"] episode " in driver.log.read_bytes():
                return
            time.sleep(_POLL_S)

    def _await(self, is_done: Callable[[], bool], driver: Driver) -> bool:
        deadline = time.monotonic() + self._limit_s
        while not is_done():
            if time.monotonic() > deadline:
                return False
            if driver.process.poll() is not None:
                # It may have died of the fault just now.
                return is_done()
            time.sleep(_POLL_S)
        return True

    def _recoveries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for path in sorted((self._folder / "runs" / "soak").glob("*/recoveries.jsonl")):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [json.loads(line) for line in lines if line.endswith("}")]
        return found

    def _num_recoveries(self) -> int:
        return len(self._recoveries())

    def _num_episodes(self) -> int:
        runs = sorted((self._folder / "runs" / "soak").glob("*/metrics.jsonl"))
        return len(runs[-1].read_text(encoding="utf-8").splitlines()) if runs else 0


def run_undisturbed(folder: Path, config: Path, mark: str, limit_s: float) -> dict[str, Any]:
    """The account of the run without faults.

    Raises:
        RuntimeError: it does not end well.
    """
    campaign = Campaign(folder, config, mark, limit_s=limit_s)
    problem = campaign.run_alone()
    if problem:
        raise RuntimeError(f"the undisturbed run {problem}")
    left = campaign.find_leftovers()
    if left:
        raise RuntimeError(f"the undisturbed run left {left}")
    return campaign.account()


def describe(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Outcomes as rows of a table."""
    return [asdict(outcome) for outcome in outcomes]


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
