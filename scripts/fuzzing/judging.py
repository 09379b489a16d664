"""Runs cases in a process of their own and says how each of them ended."""

from __future__ import annotations

import multiprocessing
import random
import resource
import shutil
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from chatlearn.errors import ChatLearnError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Case", "CaseMaker", "Outcome", "run_cases"]

_MEMORY_BYTES = 12 << 30
_LONGEST_LINE = 1200
_START_S = 180.0
_BUILT = "built"


class Case(Protocol):
    """One damaged input."""

    @property
    def description(self) -> str:
        """What was damaged, and how."""
        ...

    @property
    def must_refuse(self) -> bool:
        """Whether accepting it is a failure."""
        ...

    def load(self) -> None:
        """Load it as a run does; raises where it is refused."""
        ...


class CaseMaker(Protocol):
    """Makes the cases of one kind; lives in the process that runs them."""

    def make(self, lots: random.Random) -> Case:
        """A case by lot."""
        ...


@dataclass(frozen=True)
class Outcome:
    """How one case ended.

    Attributes:
        kind: of the case.
        number: of the case within its kind.
        verdict: `accepted`, `refused` or `failed`.
        description: what was damaged.
        text: the refusal, or what went wrong.
    """

    kind: str
    number: int
    verdict: str
    description: str
    text: str = ""


def run_cases(
    kind: str,
    build: Callable[[Path], CaseMaker],
    numbers: range,
    seed: int,
    limit_s: float,
) -> Iterator[Outcome]:
    """Run cases one after another; a process that hangs or dies is replaced.

    Args:
        kind: of the cases; their lots depend on it, the seed and their number only.
        build: gives the maker, in the process that runs the cases; gets a folder of its own.
        numbers: of the cases.
        seed: of the lots.
        limit_s: of one case.
    """
    at = numbers.start
    while at < numbers.stop:
        runner = _Runner(kind, build, range(at, numbers.stop), seed)
        try:
            for outcome in runner.outcomes(limit_s):
                yield outcome
                at = outcome.number + 1
        finally:
            runner.close()


class _Runner:
    """A process that runs cases until one hangs or kills it."""

    def __init__(self, kind: str, build: Any, numbers: range, seed: int) -> None:
        self._kind = kind
        self._numbers = numbers
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._folder = Path(tempfile.mkdtemp(prefix="chatlearn-fuzz-"))
        arguments = (kind, build, numbers, seed, self._folder, other)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def outcomes(self, limit_s: float) -> Iterator[Outcome]:
        """One for each number; the last one may be that of a hang or a death."""
        try:
            if not self._end.poll(_START_S) or self._end.recv() != _BUILT:
                raise RuntimeError(f"{self._kind}: nothing to damage within {_START_S:g} s")
        except EOFError:
            raise RuntimeError(f"{self._kind}: what is to be damaged cannot be made") from None
        for number in self._numbers:
            try:
                if not self._end.poll(limit_s):
                    yield self._failure(number, f"does not end within {limit_s:g} s")
                    return
                yield self._end.recv()
            except EOFError:
                self._process.join(5)
                yield self._failure(number, f"the process died: {self._process.exitcode}")
                return

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._end.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _failure(self, number: int, text: str) -> Outcome:
        return Outcome(self._kind, number, "failed", "see the seed and the number", text)


def _serve(kind: str, build: Any, numbers: range, seed: int, folder: Path, end: Any) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    maker: CaseMaker = build(folder)
    end.send(_BUILT)
    marker = folder / "owned"
    for number in numbers:
        case = maker.make(random.Random(f"{seed}/{kind}/{number}"))
        verdict, text = _judge(case)
        if marker.exists():
            marker.rmdir()
            verdict, text = "failed", "code from the file was run"
        end.send(Outcome(kind, number, verdict, case.description, text))


def _judge(case: Case) -> tuple[str, str]:
    try:
        case.load()
    except ChatLearnError as error:
        text = str(error)
        longest = max(map(len, text.splitlines()), default=0)
        if "Traceback" in text or longest > _LONGEST_LINE:
            return "failed", f"no line for a person: {text[:2000]}"
        return "refused", text[:300]
    except BaseException:  # noqa: BLE001 - that is what is looked for
        return "failed", traceback.format_exc()
    return ("failed", "accepted, and must not be") if case.must_refuse else ("accepted", "")
