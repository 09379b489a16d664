"""The last collective of a process is known by name and shape."""

import torch
import torch.distributed as dist

from chatlearn.runtime.collective_log import CollectiveLog, install


def test_the_last_collective_is_described(monkeypatch):
    seen = []
    log = CollectiveLog()
    for name in ("all_reduce", "barrier"):
        fake = lambda *args: seen.append(log.describe())  # noqa: E731
        monkeypatch.setattr(dist, name, fake)
        monkeypatch.setattr(dist.distributed_c10d, name, fake)
    before = {
        (owner, name): getattr(owner, name)
        for owner in (dist, dist.distributed_c10d)
        for name in dir(owner)
    }
    try:
        assert log.describe() == "no collective yet"
        install(log)
        dist.all_reduce(torch.zeros(2, 3))
        assert log.describe() == "after all_reduce [2, 3], number 1, begun 0 s ago"
        dist.distributed_c10d.barrier()
        assert log.describe() == "after barrier, number 2, begun 0 s ago"
    finally:
        for (owner, name), value in before.items():
            if getattr(owner, name, None) is not value:
                setattr(owner, name, value)
    assert seen == [
        "in all_reduce [2, 3], number 1, begun 0 s ago",
        "in barrier, number 2, begun 0 s ago",
    ]
