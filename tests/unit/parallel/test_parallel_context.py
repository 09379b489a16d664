"""The worker's context keeps resources and closes them."""

import torch

from chatlearn.parallel.context import WorkerContext
from chatlearn.parallel.layout import ParallelLayout


class Resource:
    def __init__(self, name, log):
        self.name = name
        self.log = log

    def close(self):
        self.log.append(self.name)


def build_context():
    device = torch.device("cpu")
    layout = ParallelLayout()
    return WorkerContext("m", None, 0, 0, layout, device, None, "127.0.0.1", "n", 1, 5.0)


def test_a_resource_is_built_once_per_key():
    context, log = build_context(), []
    first = context.keep(("sync", 1), lambda: Resource("a", log))
    assert context.keep(("sync", 1), lambda: Resource("b", log)) is first
    assert context.keep(("sync", 2), lambda: Resource("c", log)).name == "c"


def test_resources_are_closed_newest_first_and_once():
    context, log = build_context(), []
    for name in ("a", "b", "c"):
        context.keep(name, lambda name=name: Resource(name, log))
    context.drop("b")
    context.drop("b")
    context.close()
    context.close()
    assert log == ["b", "c", "a"]
