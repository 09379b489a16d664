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

from scripts.faults.checkpoints import find_bad_checkpoints
from scripts.faults.traces import MARK, Silence, await_silence, kill_marked
from scripts.faults.workload import read_account, read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "SOON_S",
    "Account",
    "Campaign",
    "Fault",
    "Outcome",
    "Report",
    "run_undisturbed",
]

ROOT = Path(__file__).resolve().parents[2]
_POLL_S = 0.05
# Ray's agents take a minute to see that their cluster is gone.
_SILENCE_S = 120.0
SOON_S = 20.0


@dataclass(frozen=True)
class Fault:
    """What shall happen: `kind` to the first rank of `model` that comes to `stage`.

    Attributes:
        kind: of fault.
        model: who suffers.
        stage: when.
        moment: of the stage, where it has more than one: `writing`, in the midst of a file of a
            checkpoint, on the thread that writes it.
    """

    kind: str
    model: str
    stage: str
    moment: str = ""


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
        details: what else there is to say.
    """

    fault: str
    model: str
    stage: str
    outcome: str = "did not happen"
    recovery_s: float = 0.0
    survived: bool = False
    details: str = ""

    def tell(self, text: str) -> None:
        """Add to the details."""
        self.details += f"; {text}" if self.details else text

    def fail(self, text: str) -> None:
        """Add to the outcome what went wrong."""
        self.survived = False
        self.outcome += f"; {text}"


@dataclass(frozen=True)
class Account:
    """What must be the same as in the undisturbed run.

    Attributes:
        trained: what every update was made on.
        metrics: timings aside.
    """

    trained: dict[str, str]
    metrics: list[dict[str, float]]


@dataclass
class Report:
    """What became of the faults of one run, or of several.

    Attributes:
        outcomes: one for each fault.
        left: processes, shared memory and checkpoints that should not be there.
        same_training_samples: every update was made on those of the undisturbed run.
        same_metrics: they equal those of the undisturbed run.
    """

    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    left: list[str] = field(default_factory=list[str])
    same_training_samples: bool = True
    same_metrics: bool = True

    def add(self, other: Report) -> None:
        """Take in what became of further runs."""
        self.outcomes += other.outcomes
        self.left += other.left
        self.same_training_samples &= other.same_training_samples
        self.same_metrics &= other.same_metrics

    def compare(self, found: Account, expected: Account) -> None:
        """See whether a run came to the same; where it did not, none of its faults counts."""
        self.same_training_samples &= found.trained == expected.trained
        self.same_metrics &= found.metrics == expected.metrics
        names = {"samples": self.same_training_samples, "metrics": self.same_metrics}
        for what in (name for name, is_same in names.items() if not is_same):
            for outcome in self.outcomes:
                outcome.fail(f"the {what} differ")

    def to_json(self) -> dict[str, Any]:
        """The one JSON object that tells of all."""
        return {
            "faults": len(self.outcomes),
            "survived": sum(outcome.survived for outcome in self.outcomes),
            "same_training_samples": self.same_training_samples,
            "same_metrics": self.same_metrics,
            "left": self.left,
            "rows": [asdict(outcome) for outcome in self.outcomes],
        }

    @property
    def is_good(self) -> bool:
        """Whether all was survived, nothing differs, and nothing is left."""
        is_same = self.same_training_samples and self.same_metrics
        return is_same and not self.left and all(outcome.survived for outcome in self.outcomes)


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
        actions: what the bench does, and tells, once a worker has come to the moment of a fault
            that is not the worker's own business; by kind of fault.
    """

    def __init__(
        self,
        folder: Path,
        config: Path,
        mark: str,
        environment: Mapping[str, str] | None = None,
        limit_s: float = 150.0,
        actions: Mapping[str, Callable[[], str]] | None = None,
    ) -> None:
        self._folder = folder
        self._config = config
        self._mark = mark
        self._environment = environment or {}
        self._limit_s = limit_s
        self._actions = actions or {}
        self._num_drivers = 0

    def survive(self, faults: Sequence[Fault], expected: Account) -> Report:
        """Let the faults happen, and see what became of the run."""
        report = Report(self.run(faults))
        silence = self.find_leftovers(report.left)
        if silence.waited_s > SOON_S and report.outcomes:
            report.outcomes[-1].tell(f"processes ended {silence.waited_s:.0f} s after the run")
        report.compare(self.account(), expected)
        return report

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
                outcomes[-1].fail(f"the run ended with {code}: {_last_line(driver.log)}")
        except subprocess.TimeoutExpired:
            outcomes[-1].fail("the run did not end")
        finally:
            driver.process.kill()
            driver.process.wait()
        # One that ended early has not let the others happen.
        outcomes += [Outcome(f.kind, f.model, f.stage) for f in faults[len(outcomes) :]]
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

    def find_leftovers(self, left: list[str]) -> Silence:
        """Add what the run has left that it should not have: processes, and bad checkpoints."""
        silence = await_silence(self._mark, _SILENCE_S)
        left += silence.left
        if silence.left:
            kill_marked(self._mark)
        left += find_bad_checkpoints(sorted((self._folder / "runs" / "soak").glob("*")))
        return silence

    def account(self) -> Account:
        """What must be the same as in the undisturbed run."""
        return Account(read_account(self._folder), read_metrics(self._folder))

    def _suffer(self, driver: Driver, fault: Fault, outcome: Outcome) -> Driver:
        num_before, episode = self._num_recoveries(), self._num_episodes()
        if not self._strike(driver, fault):
            return driver
        start_s = time.monotonic()
        if fault.moment:
            outcome.tell(fault.moment)
        action = self._actions.get(fault.kind)
        if action is not None:
            outcome.tell(action())
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

    def _strike(self, driver: Driver, fault: Fault) -> bool:
        """Until someone has come to the moment; False where nobody did."""
        moments = self._folder / "moments"
        (moments / "driver.pid").write_text(str(driver.process.pid), encoding="utf-8")
        moment = moments / f"{fault.model}.{fault.moment or fault.stage}"
        draft = moments / "draft"
        draft.write_text(fault.kind, encoding="utf-8")
        draft.rename(moment)
        is_struck = self._await(lambda: not moment.exists(), driver)
        if not is_struck:
            moment.unlink(missing_ok=True)
        return is_struck

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


def run_undisturbed(folder: Path, config: Path, mark: str, limit_s: float) -> Account:
    """The account of the run without faults.

    Raises:
        RuntimeError: it does not end well.
    """
    campaign = Campaign(folder, config, mark, limit_s=limit_s)
    problem = campaign.run_alone()
    if problem:
        raise RuntimeError(f"the undisturbed run {problem}")
    left: list[str] = []
    campaign.find_leftovers(left)
    if left:
        raise RuntimeError(f"the undisturbed run left {left}")
    return campaign.account()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else ""
