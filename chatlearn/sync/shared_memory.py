"""Tensors of one process that others on the same device or host read in place.

On the CPU the storages of live tensors are moved to shared memory, once, where they stay: the
tensors keep their identity, and a reader copies straight out of them. That memory has no name: it
is reached through the owner's file descriptors, so that nothing of it outlives the processes that
use it, however they end. On CUDA tensors are opened by IPC handle. An owner keeps what it shares
as long as the tensors live; a reader keeps what it has opened until it is offered something else.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from chatlearn.errors import SyncError

if TYPE_CHECKING:
    import torch

__all__ = ["CounterFiles", "OpenedTensors", "SharedTensors", "StorageHandles", "TensorHandle"]

_FOLDER = Path("/dev/shm")
_POLL_S = 0.01
# Among what `UntypedStorage._share_cuda_` gives: device, handle, size, offset, then this.
_COUNTER_FILE = 4
# File descriptors that are left to everything else in a process.
_SPARE_FILES = 256


class TensorHandle(NamedTuple):
    """How another process finds a tensor.

    Attributes:
        storage: what is needed to open the storage; its first entry is the kind of device.
        dtype: torch's name without the prefix.
        offset: of the first element, in elements.
        shape: of the tensor.
        stride: of the tensor, in elements.
    """

    storage: tuple[Any, ...]
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class StorageHandles:
    """Handles of storages, each made once as long as its storage lives.

    A storage may be freed and another one come to lie where it was, with as many bytes. That one
    has a handle of its own: a weak reference tells the two apart.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int], tuple[Any, tuple[Any, ...]]] = {}

    def find(self, storage: Any, make: Callable[[Any], tuple[Any, ...]]) -> tuple[Any, ...]:
        """The handle of a storage; made by `make(storage)` where there is none yet."""
        from torch.multiprocessing.reductions import StorageWeakRef

        place, reference = (storage.data_ptr(), storage.nbytes()), StorageWeakRef(storage)
        kept = self._kept.get(place)
        if kept is None or kept[0] != reference:
            kept = self._kept[place] = (reference, make(storage))
        return kept[1]

    def retain(self, places: Collection[tuple[int, int]]) -> None:
        """Forget all but those at these places: addresses and numbers of bytes."""
        self._kept = {place: kept for place, kept in self._kept.items() if place in places}


class SharedTensors:
    """What an owner shares; a resource of its context.

    Handles are made once for each storage: on CUDA each one made holds a counter until the end.
    """

    def __init__(self) -> None:
        self._cuda_handles = StorageHandles()

    def share(
        self, tensors: Mapping[str, torch.Tensor], *, reserved_bytes: int, timeout_s: float
    ) -> dict[str, TensorHandle] | None:
        """Make tensors readable for other processes, and say how to find them.

        Shared memory that does not suffice is noticed before anything is written: a page that
        cannot be had would end the process with a SIGBUS. Each storage takes a file descriptor.

        Args:
            tensors: by name; those on the CPU move to shared memory, together with all tensors
                that share their storages.
            reserved_bytes: shared memory that must stay free, for others who count on it.
            timeout_s: limit of the wait for other processes that share at the same moment.

        Returns:
            The handles by name; None where shared memory is too small, too few files may be
            open, or a storage is mapped from a file already.

        Raises:
            SyncError: the lock was not to be had in time.
        """
        storages: list[Any] = [tensor.untyped_storage() for tensor in tensors.values()]
        missing = {
            storage.data_ptr(): storage
            for storage in storages
            if storage.device.type == "cpu" and not storage.is_shared()
        }
        if not missing:
            return self._describe(tensors)
        if not _FOLDER.is_dir() or not _may_open(len(missing)):
            return None
        num_bytes = sum(storage.nbytes() for storage in missing.values())
        with _alone(timeout_s):
            if shutil.disk_usage(_FOLDER).free < num_bytes + reserved_bytes:
                return None
            for storage in missing.values():
                storage._share_fd_cpu_()
        return self._describe(tensors)

    def close(self) -> None:
        """Forget the handles; what is shared stays so as long as its tensors live."""
        self._cuda_handles.retain(())

    def _describe(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorHandle] | None:
        handles: dict[tuple[int, int], tuple[Any, ...]] = {}
        found: dict[str, TensorHandle] = {}
        for name, tensor in tensors.items():
            storage: Any = tensor.untyped_storage()
            place = (storage.data_ptr(), storage.nbytes())
            if place not in handles:
                if storage.device.type == "cpu":
                    handle = _cpu_handle(storage)
                else:
                    handle = self._cuda_handles.find(storage, _cuda_handle)
                if handle is None:
                    return None
                handles[place] = handle
            found[name] = TensorHandle(
                handles[place],
                str(tensor.dtype).removeprefix("torch."),
                int(tensor.storage_offset()),
                tuple(tensor.shape),
                tuple(tensor.stride()),
            )
        self._cuda_handles.retain(handles)
        return found


class CounterFiles:
    """torch's files in which readers of this process's tensors on a GPU count themselves.

    torch removes them where a process ends by itself, which Ray's workers do not, and uses them as
    long as the process lives. So this is closed with the worker; one that is killed leaves them.
    """

    def __init__(self) -> None:
        self._paths: set[Path] = set()

    def add(self, handles: Mapping[str, TensorHandle]) -> None:
        """Those of these tensors."""
        for kind, *arguments in {handle.storage for handle in handles.values()}:
            if kind == "cuda":
                self._paths.add(_FOLDER / os.fsdecode(arguments[_COUNTER_FILE]).lstrip("/"))

    def close(self) -> None:
        """Remove them: nobody opens tensors of this process any more."""
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._paths.clear()


class OpenedTensors:
    """What a reader has opened, by owner; a resource of the reader's context."""

    def __init__(self) -> None:
        self._storages: dict[int, dict[tuple[Any, ...], Any]] = {}
        self._handles: dict[int, Mapping[str, TensorHandle]] = {}
        self._tensors: dict[int, dict[str, torch.Tensor]] = {}

    def open(
        self, owner: int, handles: Mapping[str, TensorHandle], device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        """The owner's tensors by name; storages that it no longer offers are let go."""
        if self._handles.get(owner) == handles:
            return self._tensors[owner]
        known = self._storages.get(owner, {})
        opened: dict[tuple[Any, ...], Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, handle in handles.items():
            if handle.storage not in opened:
                kept = known.get(handle.storage)
                opened[handle.storage] = kept if kept is not None else _open(handle.storage, device)
            tensors[name] = _view(opened[handle.storage], handle, device)
        self._storages[owner] = opened
        self._handles[owner] = handles
        self._tensors[owner] = tensors
        return tensors

    def tensors(self, owner: int) -> Mapping[str, torch.Tensor]:
        """What is open of an owner."""
        return self._tensors.get(owner, {})

    def handles(self, owner: int) -> Mapping[str, TensorHandle]:
        """By which handles it was opened."""
        return self._handles[owner]

    def close(self) -> None:
        """Let go of everything."""
        for kept in (self._tensors, self._handles, self._storages):
            kept.clear()


@contextmanager
def _alone(timeout_s: float) -> Generator[None]:
    """Keep other processes of this user from taking the same shared memory meanwhile."""
    path = Path(tempfile.gettempdir()) / f"chatlearn-shared-memory-{os.getuid()}.lock"
    deadline = time.monotonic() + timeout_s
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise SyncError(
                        f"{path} was held by another process for {timeout_s:g} s: is one of them "
                        "stopped?"
                    ) from None
                time.sleep(_POLL_S)
        yield


def _may_open(count: int) -> bool:
    """Whether so many more files may be open; raises this process's own limit if it must."""
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + count + _SPARE_FILES
    if limit == resource.RLIM_INFINITY or needed <= limit:
        return True
    if most != resource.RLIM_INFINITY and needed > most:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, most))
    return True


def _cpu_handle(storage: Any) -> tuple[Any, ...] | None:
    """Process, file descriptor, inode and size; None where there is no descriptor."""
    number, num_bytes = storage._share_fd_cpu_()
    if number < 0:
        return None
    return ("cpu", os.getpid(), number, os.fstat(number).st_ino, num_bytes)


def _cuda_handle(storage: Any) -> tuple[Any, ...]:
    return ("cuda", *storage._share_cuda_())


def _open(storage: tuple[Any, ...], device: torch.device) -> Any:
    import torch

    untyped: Any = torch.UntypedStorage
    kind, *arguments = storage
    if kind == "cpu":
        return torch.frombuffer(_map(*arguments), dtype=torch.uint8).untyped_storage()
    torch.cuda.init()
    # Without the owner's index of the device; here the same device may have another one.
    return untyped._new_shared_cuda(device.index, *arguments[1:])


def _map(process_id: int, number: int, inode: int, num_bytes: int) -> mmap.mmap:
    path = f"/proc/{process_id}/fd/{number}"
    try:
        file = os.open(path, os.O_RDWR)
        try:
            if os.fstat(file).st_ino != inode:
                raise OSError("it is another file by now")
            return mmap.mmap(file, num_bytes)
        finally:
            os.close(file)
    except OSError as error:
        raise SyncError(
            f"shared tensors of process {process_id} cannot be opened at {path}: {error}; where "
            "processes do not see each other, set runtime.weight_sync_transport: collective"
        ) from error


def _view(storage: Any, handle: TensorHandle, device: torch.device) -> torch.Tensor:
    import torch

    where = device if handle.storage[0] == "cuda" else torch.device("cpu")
    empty = torch.empty(0, dtype=getattr(torch, handle.dtype), device=where)
    return empty.set_(storage, handle.offset, handle.shape, handle.stride)
