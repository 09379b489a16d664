"""Which methods are recorded in a flow, and which calls are refused."""

import functools
from typing import Any

import pytest

from chatlearn.errors import FlowError
from chatlearn.flow.trace import trace_flow
from chatlearn.models.base import BaseModule


class Parent(BaseModule):
    def forward_step(self, data):
        return {"from": "parent", **data}

    def refine(self, data, *, scale=1):
        return {"scale": scale}


class Mixin:
    def judge(self, data):
        return {"judged": True}

    @staticmethod
    def shorten(text):
        return text[:3]


class Child(Mixin, Parent):
    limit = 7

    def forward_step(self, data):
        return {**super().forward_step(data), "from": "child"}

    def two(self, one, other):
        return {}

    def rows(self, data):
        yield data

    def describe(self, text="plain"):
        return f"{self.name} {text}"

    def _private(self, data):
        return "private"

    @property
    def size(self):
        return 5

    @classmethod
    def label(cls):
        return cls.__name__


def child() -> Any:
    return Child("child")


def nodes(flow):
    graph = trace_flow(flow, name="environment").graph
    return [(node.method_name, dict(node.constants)) for node in graph.nodes]


def test_own_inherited_and_mixed_in_methods_are_recorded():
    model = child()

    def flow(batch):
        out = model.forward_step(batch)
        return model.judge(model.refine(out, scale=2))

    assert nodes(flow) == [("forward_step", {}), ("refine", {"scale": 2}), ("judge", {})]


def test_outside_a_trace_methods_are_plain_calls():
    model = child()
    assert model.forward_step({"x": 1}) == {"from": "child", "x": 1}
    assert model.judge({}) == {"judged": True}
    assert model.refine({}, scale=3) == {"scale": 3}


def test_a_class_keeps_its_names_docs_and_other_members():
    model = child()
    assert Child.forward_step.__name__ == "forward_step"
    assert BaseModule.save_checkpoint.__doc__ is not None
    assert (model.size, model.label(), model.shorten("abcdef"), model.limit) == (
        5,
        "Child",
        "abc",
        7,
    )


def test_calls_without_a_batch_and_private_methods_run_at_trace_time():
    model, seen = child(), []

    def flow(batch):
        seen.extend([model.describe("model"), model._private("x"), model.shorten("abcdef")])
        return model.forward_step(batch)

    assert nodes(flow) == [("forward_step", {})]
    assert seen == ["child model", "private", "abc"]


def test_a_method_replaced_in_a_subclass_is_the_one_that_counts():
    class Grandchild(Child):
        def judge(self, data):
            return {**super().judge(data), "twice": True}

    model: Any = Grandchild("g")
    assert model.judge({}) == {"judged": True, "twice": True}
    assert nodes(lambda batch: model.judge(batch)) == [("judge", {})]


def test_a_decorated_method_is_recorded_once():
    def logged(method):
        @functools.wraps(method)
        def call(self, data):
            return method(self, data)

        return call

    class Decorated(BaseModule):
        @logged
        def forward_step(self, data):
            return data

    model = Decorated("d")
    assert nodes(lambda batch: model.forward_step(batch)) == [("forward_step", {})]
    assert model.forward_step({"x": 1}) == {"x": 1}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m.forward_step(), "child.forward_step is called without a batch"),
        (lambda m, b: m.refine(b, 3), "child.refine takes 3 beside a batch: pass it by keyword"),
        (lambda m, b: m.forward_step([b]), "takes batches one by one, not inside a list or dict"),
        (lambda m, b: m.refine(b, scale={"k": b}), "takes batches one by one"),
        (lambda m, b: m.train_step(b), "child.train_step is not there: define the method"),
        (lambda m, b: m.setup(b), "child.setup is called by the framework"),
        (lambda m, b: m.rows(b), "child.rows is async or a generator: write a plain method"),
        (lambda m, b: m.refine(b, size=1), r"cannot be called as method\(data, \*\*options\)"),
        (lambda m, b: m.two(b, b), "All inputs of a call arrive merged into one dict, `data`"),
    ],
)
def test_a_call_that_cannot_work_names_the_flows_line_and_the_remedy(call, message):
    model = child()

    def flow(batch):
        return call(model, batch)

    with pytest.raises(FlowError, match=message) as caught:
        trace_flow(flow, name="environment")
    assert str(caught.value).startswith(f"{__file__}:")


def test_a_constructor_that_only_sets_the_name_is_not_enough():
    class Halfway(BaseModule):
        def __init__(self):
            self.name = "halfway"

        def forward_step(self, data):
            return data

    message = r"halfway.forward_step is not set up: call super\(\).__init__\(name\)"
    with pytest.raises(FlowError, match=message):
        trace_flow(Halfway().forward_step, name="environment")


def test_a_module_needs_its_constructor_and_an_identifier_for_a_name():
    class Nameless(BaseModule):
        def __init__(self):
            pass

        def forward_step(self, data):
            return data

    with pytest.raises(FlowError, match=r"is not set up: call super\(\).__init__\(name\)"):
        trace_flow(Nameless().forward_step, name="environment")
    wrong: Any = 3
    for name in ("two words", "", "a.b", wrong):
        with pytest.raises(FlowError, match="expected an identifier such as 'policy'"):
            BaseModule(name)
