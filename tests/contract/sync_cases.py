"""A trainer and a sampler with weights of every kind, and what tests do to them in workers."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from chatlearn import BaseModule
from chatlearn.config import load_config
from chatlearn.data.rows import RowBatch, RowId
from chatlearn.engine.worker_calls import set_up_module
from chatlearn.flow.stage import StageCall, StageInput, run_stage
from chatlearn.parallel.sharding import Box
from chatlearn.runtime.contract import ModelSpec
from chatlearn.runtime.placement import DeviceInventory, build_requests, plan_placement
from chatlearn.runtime.ray_backend import RayBackend
from chatlearn.sync.synchronizer import SyncSettings, WeightSynchronizer

TIMEOUT_S = 60.0
POLL_S = 0.02


@dataclass(frozen=True)
class Kind:
    """One weight: its dtype with trainer and sampler, and its shape.

    A padded one has rows at the end, more with the sampler, that no description tells of.
    """

    given: torch.dtype
    taken: torch.dtype
    shape: tuple[int, ...]
    is_turned: bool = False
    is_padded: bool = False


KINDS = {
    "rounded": Kind(torch.float32, torch.bfloat16, (37, 19)),
    "widened": Kind(torch.bfloat16, torch.float32, (5, 7)),
    "precise": Kind(torch.float64, torch.float64, (3, 4, 5)),
    "halved": Kind(torch.float16, torch.float16, (11,)),
    "counts": Kind(torch.int64, torch.int64, (9,)),
    "octets": Kind(torch.uint8, torch.uint8, (13,)),
    "flags": Kind(torch.bool, torch.bool, (2, 5)),
    "scalar": Kind(torch.float32, torch.float32, ()),
    "turned": Kind(torch.float32, torch.float32, (8, 30), is_turned=True),
    "large": Kind(torch.float32, torch.float32, (1200, 40)),
    "split": Kind(torch.float32, torch.bfloat16, (7, 6)),
    "embed": Kind(torch.float32, torch.float32, (12, 8)),
    "flat_a": Kind(torch.float32, torch.float32, (6, 4)),
    "flat_b": Kind(torch.float32, torch.float32, (10,)),
    "empty": Kind(torch.float32, torch.float32, (0, 3)),
    "padded": Kind(torch.float32, torch.float32, (9, 4), is_padded=True),
    "fixed": Kind(torch.float32, torch.float32, (4, 4)),
}
TIED = {"head": "embed"}


def value_of(name, version):
    """The trainer's values of a weight in one version."""
    kind = KINDS[name]
    source = torch.Generator().manual_seed(1000 * version + sorted(KINDS).index(name))
    if kind.given.is_floating_point:
        return torch.randn(kind.shape, generator=source, dtype=torch.float64).to(kind.given)
    most = 2 if kind.given == torch.bool else 200
    return torch.randint(0, most, kind.shape, generator=source).to(kind.given)


class Weights(BaseModule):
    """Holds every kind; `split` lies in halves on a trainer's two ranks."""

    def __init__(self, name, *, is_source):
        super().__init__(name)
        self.is_source = is_source
        self.is_fixed = False
        self.told = {}
        self.hook = None

    def setup(self):
        self.model = torch.nn.Module()
        flat = torch.zeros(34, device=self.device)
        views = {"flat_a": flat[:24].view(6, 4), "flat_b": flat[24:]}
        for name, kind in KINDS.items():
            tensor = views[name] if name in views and self.is_source else self.zeros(name)
            if kind.given.is_floating_point:
                self.model.register_parameter(name, torch.nn.Parameter(tensor))
            else:
                self.model.register_buffer(name, tensor)
        self.model.head = self.model.embed

    def zeros(self, name):
        """A weight as this module stores it: one side or the other has it transposed."""
        kind = KINDS[name]
        shape = list(kind.shape)
        if name == "split":
            shape[0] = self.rows.stop - self.rows.start
        dtype = kind.given if self.is_source else kind.taken
        if kind.is_turned and self.is_source:
            return torch.zeros(shape[::-1], dtype=dtype, device=self.device).t()
        if kind.is_padded:
            return torch.cat([torch.zeros(shape, dtype=dtype), self.padding(name)]).to(self.device)
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def padding(self, name):
        """The last rows of a padded weight, which are this side's own and stay as they are."""
        num_rows, value = (2, -1.0) if self.is_source else (5, 7.0)
        return torch.full((num_rows, *KINDS[name].shape[1:]), value)

    @property
    def rows(self):
        """The rows of `split` that are here."""
        cut = [0, 4, 7] if self.is_source and self.layout.world_size == 2 else [0, 7]
        return slice(cut[self.rank], cut[self.rank + 1])

    def own_value(self, name, version):
        value = value_of(TIED.get(name, name), version)
        if name in KINDS and KINDS[name].is_padded:
            return torch.cat([value, self.padding(name)])
        return value[self.rows] if name == "split" else value

    def weight_shards(self):
        def place(shard):
            if shard.key == "split":
                box = Box((self.rows.start, 0), shard.box.shape)
                shard = replace(shard, global_shape=KINDS["split"].shape, box=box)
            if shard.key in KINDS and KINDS[shard.key].is_padded:
                shape = KINDS[shard.key].shape
                shard = replace(shard, global_shape=shape, box=Box((0, 0), shape))
            return replace(shard, **self.told.get(shard.key, {}))

        return tuple(place(shard) for shard in super().weight_shards())

    def weight_tensors(self):
        if self.hook is not None:
            self.hook(self)
        return super().weight_tensors()

    def frozen_weights(self):
        return ("fixed",) if self.is_fixed else ()

    def forward_step(self, data):
        return {"scalar": [self.model.scalar.item()] * len(data["prompt"])}


# What runs in workers.


def write(context, version, is_replaced=False, names=None):
    """Give the trainer the weights of a version: in its tensors, or as new tensors."""
    module = context.module
    with torch.no_grad():
        for name in names or KINDS:
            tensor = getattr(module.model, name)
            if not is_replaced:
                tensor.copy_(module.own_value(name, version))
            elif isinstance(tensor, torch.nn.Parameter):
                tensor.data = torch.empty_like(tensor).copy_(module.own_value(name, version))
            else:
                setattr(
                    module.model, name, module.own_value(name, version).to(tensor.device, copy=True)
                )


def differing(context, version):
    """Names of the sampler's weights that do not have the bits of a version."""
    module = context.module
    wrong = []
    for name in (*KINDS, *TIED):
        tensor = getattr(module.model, name)
        wanted = module.own_value(name, version).to(tensor.dtype)
        if not torch.equal(tensor.detach().cpu(), wanted):
            wrong.append(name)
    return wrong


def blank(context):
    """Forget all weights, and what an earlier test set up."""
    module = context.module
    context.unusable_reason, context.reserved_shm_bytes, context.weights_version = "", 0, 0
    module.hook, module.is_fixed, module.told = None, False, {}
    module.setup()


def set_node(context, node_id):
    """Claim to be on a node."""
    context.node_id = node_id


def reserve_all_memory(context):
    """Leave no shared memory for weights."""
    context.reserved_shm_bytes = 1 << 60


def set_hook(context, hook):
    """Run `hook(module)` whenever a sync asks for the module's tensors."""
    context.module.hook = hook


def tell(context, key, fields):
    """Describe a weight wrongly."""
    context.module.told = {key: fields}


def resize(context, name, shape):
    """Give a weight another shape, in silence."""
    getattr(context.module.model, name).data = torch.zeros(shape, device=context.device)


def spoil_element(context, name):
    """Change one element."""
    with torch.no_grad():
        getattr(context.module.model, name).view(-1)[0] = 77.0


def overlap(context):
    """Let two weights share one element, by mistake."""
    flat = torch.zeros(33, device=context.device)
    context.module.model.flat_a.data = flat[:24].view(6, 4)
    context.module.model.flat_b.data = flat[23:]


def serve(context):
    """What the sampler answers to a flow."""
    rows = RowBatch((RowId(0, 0),), {"prompt": [1]})
    call = StageCall("forward_step", rows.row_ids, (StageInput("data", [rows]),), iteration=0)
    return run_stage(context, call)[0].columns["scalar"][0]


def set_version(context, version):
    """Have made so many updates, or come from so many syncs."""
    context.weights_version = version


def freeze(context, is_fixed=True):
    context.module.is_fixed = is_fixed


def doubled_bytes(context):
    """Bytes of the weights, and of their second copy; each tensor counts once."""
    copies = [kept for key, kept in context._resources.items() if key[0] == "sync shadow"]
    pairs = (context.module.weight_tensors(), copies[0].tensors)
    unique = [{tensor.data_ptr(): tensor.nbytes for tensor in kept.values()} for kept in pairs]
    return [sum(sizes.values()) for sizes in unique]


def kept(context):
    """What syncs keep here."""
    return [key for key in context._resources if str(key[0]).startswith("sync ")]


def has_channel(context):
    """Whether any end of a channel is open here."""
    return any(key[0] == "sync channel" for key in context._resources)


def measure(context):
    """What this process holds."""
    import ctypes
    import gc

    import psutil

    gc.collect()
    # What malloc keeps for later is no leak, but comes and goes by megabytes.
    ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    return {
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children()),
        "bytes": process.memory_info().rss,
        "device bytes": _device_bytes(context.device),
    }


def _device_bytes(device):
    """What all processes have of a GPU, but for what torch keeps for later."""
    if device.type == "cpu":
        return 0
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info(device)
    return whole - free


@dataclass
class Slip:
    """A hook that changes one element of a weight after some calls."""

    name: str
    num_free: int

    def __call__(self, module):
        if self.num_free == 0:
            module.hook = None
            spoil_element(module.context, self.name)
        self.num_free -= 1


@dataclass
class Pause:
    """A hook that takes its time, once."""

    seconds: float

    def __call__(self, module):
        module.hook = None
        time.sleep(self.seconds)


@dataclass
class Gate:
    """A hook that says it has been reached, and lets nobody through before a file is there.

    Attributes:
        folder: of the files.
        num_free: how many calls pass before that.
    """

    folder: Path
    num_free: int = 0

    def __call__(self, module):
        if self.num_free:
            self.num_free -= 1
            return
        module.hook = None
        (self.folder / "reached").touch()
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.folder / "open").exists() and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def signal_there(self, process_id, number):
        """Send a signal to the process that stands at the gate; another thread does it."""

        def wait():
            deadline = time.monotonic() + TIMEOUT_S
            while not (self.folder / "reached").exists() and time.monotonic() < deadline:
                time.sleep(POLL_S)
            os.kill(process_id, number)
            (self.folder / "open").touch()

        threading.Thread(target=wait, daemon=True).start()


class Pair:
    """A running trainer and its samplers.

    Args:
        backend: not started yet; `close` closes it.
        num_sources: ranks of the trainer.
        num_destinations: replicas of the sampler.
        gpus: of this machine, which the two share; None: logical devices.
    """

    def __init__(self, backend, folder, num_sources, num_destinations, gpus=None):
        self.backend = backend
        self.transport = "auto"
        counts = {"trainer": num_sources, "sampler": num_destinations}
        config = load_config({"models": {name: {"num_gpu": n} for name, n in counts.items()}})
        requests = build_requests(config, tuple(counts), ("trainer",))
        specs = [
            ModelSpec(
                request.model_name,
                Weights(request.model_name, is_source=request.model_name == "trainer"),
                request.layout,
                request.num_replicas,
            )
            for request in requests
        ]
        colocation = () if gpus is None else (tuple(counts),)
        inventory = DeviceInventory(1, gpus, "logical" if gpus is None else "gpu")
        placement = plan_placement(requests, colocation, inventory)
        self.config = config
        self.groups = backend.start(specs, placement, config)
        for name in counts:
            self.call(name, set_up_module, config.model(name), config.runtime, folder)

    def call(self, name, function, *args):
        """Results by rank of one model's workers."""
        calls = [call for group in self.groups[name] for call in group.call(function, *args)]
        return [self.backend.fetch(call, TIMEOUT_S) for call in calls]

    def call_one(self, name, index, function, *args):
        """The result of one worker: a rank of the trainer, or a replica of the sampler."""
        group = self.groups[name][index if name == "sampler" else 0]
        (call,) = group.call(function, *args, ranks=(0 if name == "sampler" else index,))
        return self.backend.fetch(call, TIMEOUT_S)

    def processes(self, name):
        return [worker.process_id for group in self.groups[name] for worker in group.workers]

    def prepare(self, timeout_s=TIMEOUT_S, **settings):
        """A synchronizer that is ready, with small buckets."""
        chosen = SyncSettings(
            timeout_s, **{"bucket_bytes": 4096, "transport": self.transport, **settings}
        )
        found = WeightSynchronizer(
            self.backend, self.groups["trainer"], self.groups["sampler"], chosen
        )
        found.prepare()
        return found

    def differing(self, version):
        """By sampler, the weights that are not those of a version."""
        return self.call("sampler", differing, version)

    def close(self):
        self.backend.close()


def shared_files(process_ids):
    """Files in shared memory that these processes made."""
    marks = tuple(f"torch_{number}_" for number in process_ids)
    return [name for name in os.listdir("/dev/shm") if name.startswith(marks)]


@contextmanager
def pair_on_ray(head, folder, **sizes):
    """A pair whose workers are in the session's Ray."""
    with pytest.MonkeyPatch.context() as patch:
        head.enter(patch)
        pair = Pair(RayBackend(folder), folder, **sizes)
        yield pair
        pair.close()
