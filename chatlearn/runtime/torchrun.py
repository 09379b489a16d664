"""Runs a program by torchrun and ends with the program's own exit code.

torchrun ends with 1 whatever its program's exit code was, and with a traceback of its own. So
`scripts/run_torchrun.sh` starts this file, the watcher; it starts torchrun, and torchrun starts
this file again, the keeper, which runs the program, notes its exit code and always ends well.
Signals go from the watcher straight to the keeper and on to the program.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from chatlearn.runtime.launch import signals_kept
from chatlearn.runtime.ray_node import death_signal_setter, start_child

if TYPE_CHECKING:
    import queue
    from collections.abc import Sequence

__all__ = ["keep_program", "watch_torchrun"]

_FOLDER = "CHATLEARN_TORCHRUN_FOLDER"
_TICK_S = 0.1
_LEAVE_S = 30.0


def watch_torchrun(options: Sequence[str], command: Sequence[str]) -> int:
    """Run a command by torchrun, one process on this node.

    Args:
        options: of torchrun.
        command: the program's command line.

    Returns:
        The program's exit code; torchrun's where the program never ran.
    """
    with tempfile.TemporaryDirectory(prefix="chatlearn-torchrun-") as name, signals_kept() as got:
        extra = {_FOLDER: name}
        if "CHATLEARN_PORT" in os.environ:
            extra["CHATLEARN_PORT"] = os.environ["CHATLEARN_PORT"]
        keeper = ("-m", "chatlearn.runtime.torchrun", *command)
        line = (sys.executable, "-m", "torch.distributed.run", *options, *keeper)
        return _watch(start_child(line, extra), Path(name), got)


def keep_program(command: Sequence[str], folder: Path) -> None:
    """Under torchrun: run the program in torchrun's environment and note how it ends.

    Args:
        command: the program's command line.
        folder: where this process's id and then the exit code go.
    """
    set_death_signal = death_signal_setter()
    set_death_signal()
    with signals_kept() as got:
        program = subprocess.Popen(command, process_group=0, preexec_fn=set_death_signal)
        _note(folder / "keeper", os.getpid())
        while program.poll() is None:
            while not got.empty():
                program.send_signal(got.get())
            time.sleep(_TICK_S)
    _note(folder / "exit_code", _shell_code(program.returncode))


def _watch(torchrun: subprocess.Popen[bytes], folder: Path, got: queue.SimpleQueue[int]) -> int:
    leave_at: float | None = None
    stopped: int | None = None
    while torchrun.poll() is None:
        while not got.empty():
            stopped = 128 + _forward(got.get(), torchrun, folder)
        if leave_at is None and (folder / "exit_code").exists():
            # torchrun waits for the other nodes' torchrun, also where those are lost.
            leave_at = time.monotonic() + _LEAVE_S
        if leave_at is not None and time.monotonic() > leave_at:
            _kill(torchrun)
        time.sleep(_TICK_S)
    code = _read(folder / "exit_code")
    if code is None:
        code = stopped if stopped is not None else _shell_code(torchrun.returncode)
    return code


def _forward(number: int, torchrun: subprocess.Popen[bytes], folder: Path) -> int:
    """Send a signal on to the keeper; without one there is no program yet to be asked."""
    keeper = _read(folder / "keeper")
    if keeper is None:
        _kill(torchrun)
        return number
    try:
        os.kill(keeper, number)
    except ProcessLookupError:
        _kill(torchrun)
    return number


def _kill(torchrun: subprocess.Popen[bytes]) -> None:
    # On any other signal torchrun prints a traceback; its keeper ends with it.
    os.killpg(torchrun.pid, signal.SIGKILL)


def _note(path: Path, number: int) -> None:
    draft = path.with_suffix(".new")
    draft.write_text(str(number), encoding="ascii")
    draft.replace(path)


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except OSError:
        return None


def _shell_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _main(arguments: Sequence[str]) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ and _FOLDER in os.environ:
        keep_program(arguments, Path(os.environ[_FOLDER]))
        return 0
    at = arguments.index("--")
    return watch_torchrun(arguments[:at], arguments[at + 1 :])


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
