"""Workers in this process that finish their calls one by one, in a random order."""

import random

import torch

from chatlearn.config import RuntimeConfig
from chatlearn.data.rows import RowBatch, RowId
from chatlearn.errors import WaitTimeoutError
from chatlearn.flow.call_loop import CallLoop
from chatlearn.flow.execute import FlowRun, FlowSettings, RowSource
from chatlearn.flow.lanes import LanePool
from chatlearn.flow.trace import trace_flow
from chatlearn.models.base import BaseModule
from chatlearn.parallel.context import WorkerContext
from chatlearn.parallel.layout import ParallelLayout
from chatlearn.runtime.contract import PendingCall, RemoteValue, WorkerSummary
from chatlearn.runtime.remote_values import resolve_arguments


class Slot:
    """Where the values of one call will lie."""

    def __init__(self, run):
        self.run = run
        self.value = None


class FakeGroup:
    def __init__(self, backend, module, replica, layout):
        self.backend = backend
        self.model_name = module.name
        self.replica = replica
        self.layout = layout
        ranks = range(layout.world_size)
        # Attached, as far as a stage looks.
        module._runtime_args = RuntimeConfig()
        self.workers = tuple(WorkerSummary(module.name, replica, r, "n", "h", r) for r in ranks)
        self.contexts = [
            WorkerContext(
                module.name, module, replica, r, layout, torch.device("cpu"), None, "h", "n", r, 1.0
            )
            for r in ranks
        ]

    def call(self, function, *args, ranks=None, num_outputs=1, flow_line=""):
        calls = []
        for rank in range(self.layout.world_size) if ranks is None else ranks:
            slots = tuple(Slot(None) for _ in range(num_outputs))

            def run(rank=rank, slots=slots):
                found = function(self.contexts[rank], *resolve_arguments(args, self.backend.values))
                values = [found] if num_outputs == 1 else found
                for slot, value in zip(slots, values, strict=True):
                    slot.value = value

            outputs = tuple(RemoteValue(slot) for slot in slots)
            call = PendingCall(self.workers[rank], outputs, flow_line)
            self.backend.open[id(call)] = (call, run)
            calls.append(call)
        self.backend.most_open = max(self.backend.most_open, len(self.backend.open))
        return tuple(calls)


class FakeBackend:
    """Runs a call when it is waited for; which of the open ones is drawn by `seed`."""

    def __init__(self, seed=0, is_stuck=False):
        self.random = random.Random(seed)
        self.is_stuck = is_stuck
        self.open = {}
        self.most_open = 0

    def start(self, specs, placement, config):
        raise NotImplementedError

    def explain(self, workers):
        return f"{len(workers)} workers are explained"

    def close(self):
        self.open.clear()

    def values(self, handles):
        return [handle.value for handle in handles]

    def put(self, value):
        slot = Slot(None)
        slot.value = value
        return RemoteValue(slot)

    def wait_any(self, calls, timeout_s):
        if self.is_stuck:
            raise WaitTimeoutError("nothing was done in time")
        call = self.random.choice(list(calls))
        self.open.pop(id(call))[1]()
        return (call,)

    def get(self, value, timeout_s):
        return value.handle.value

    def fetch(self, call, timeout_s, output=0):
        return self.get(call.outputs[output], timeout_s)


class Tagger(BaseModule):
    """Adds a column of its name that is 10 times another column plus 1; notes its calls."""

    def __init__(self, name, column="x"):
        super().__init__(name)
        self.column = column
        self.calls = []
        self.batches = []

    def forward_step(self, data):
        self.calls.append((self.row_ids, sorted(data)))
        return {self.name: data[self.column] * 10 + 1}

    def train_step(self, data):
        self.batches.append((self.row_ids, [part["x"] for part in data], self.iteration))
        return {"loss": 0.5}

    def score(self, data, scale=1):
        return {f"{self.name}_score": data[self.column] * scale}


def build_run(
    flow, modules, *, rows=35, samples=1, seed=0, colocation=(), on_stage=None, **settings
):
    """A flow run over `rows` rows with `x` = 0, 1, ..; `modules` maps each to (replicas, layout).

    Returns:
        The run, the loop, the backend, and the dict that `on_row` fills.
    """
    backend = FakeBackend(seed)
    groups = {
        module.name: [FakeGroup(backend, module, at, layout) for at in range(replicas)]
        for module, (replicas, layout) in modules.items()
    }
    row_ids = tuple(RowId(*divmod(at, samples)) for at in range(rows))
    batch = RowBatch(row_ids, {"x": [torch.tensor(at) for at in range(rows)]})
    source = (RowSource("batch", backend.put(batch)),)
    loop, finished = CallLoop(backend, 5.0), {}
    run = FlowRun(
        trace_flow(flow, name="environment").graph,
        dict.fromkeys(row_ids, source),
        loop,
        LanePool(groups, colocation),
        FlowSettings(settings.pop("batch_sizes", {}), **settings),
        on_row=finished.__setitem__,
        on_stage=on_stage or (lambda record: None),
    )
    loop.attach(run)
    return run, loop, backend, finished


def read_rows(backend, finished, position=0):
    """The column values of every finished row, by row id."""
    found = {}
    for row_id, sources in finished.items():
        batch = backend.get(sources[position].batch, 1.0)
        found[row_id] = batch.to_rows()[batch.row_ids.index(row_id)]
    return found


ONE = ParallelLayout()
