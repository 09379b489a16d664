"""Turns Ray's errors into WorkerErrors, and finds the first cause among several."""

from __future__ import annotations

import dis
import traceback
from typing import TYPE_CHECKING

from chatlearn.errors import WorkerError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chatlearn.runtime.contract import WorkerSummary

__all__ = ["describe_failure", "is_broken_connection", "pick_cause"]

_BROKEN = ("gloo", "nccl", "connection closed by peer", "connection reset", "broken pipe")


def describe_failure(error: Exception, worker: WorkerSummary | None, flow_line: str) -> WorkerError:
    """The WorkerError of a Ray error.

    Args:
        error: what Ray raised.
        worker: whose call it was, where known.
        flow_line: the flow line that the call served.
    """
    import ray.exceptions

    cause: object = getattr(error, "cause", None)
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(cause, WorkerError):
        return cause
    is_death = isinstance(error, ray.exceptions.RayActorError)
    is_lost = isinstance(error, ray.exceptions.ObjectLostError)
    if is_death:
        message = "the worker process died (killed, out of memory, or crashed)"
        if worker is not None and worker.process_id:
            message += f"; its process id was {worker.process_id}"
    else:
        message = f"{type(error).__name__}: {error}"
    found = WorkerError(
        message,
        model_name=worker.model_name if worker else "unknown",
        rank=worker.rank if worker else 0,
        replica=worker.replica if worker else 0,
        node=worker.host if worker else "",
        flow_line=flow_line,
        worker_traceback="" if is_death else "".join(traceback.format_exception(error)),
        is_death=is_death,
    )
    # Rows are lost with the node that held them.
    found.is_collateral = found.has_lost_rows = is_lost
    return found


def is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone, as far as one can tell.

    Its errors are raised by native code. What a `raise` statement raised is somebody's program
    speaking, whatever words it uses.
    """
    if not isinstance(error, RuntimeError):
        return False
    if not any(word in str(error).lower() for word in _BROKEN):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    code = trace.tb_frame.f_code.co_code
    return code[trace.tb_lasti] != dis.opmap["RAISE_VARARGS"]


def pick_cause(failures: Sequence[WorkerError]) -> WorkerError:
    """The likeliest first cause: a death, else an exception, else a broken connection.

    A death that a flow line belongs to is preferred over one without.
    """
    deaths = [failure for failure in failures if failure.is_death]
    if deaths:
        return next((failure for failure in deaths if failure.flow_line), deaths[0])
    return next((f for f in failures if not f.is_collateral), failures[0])
