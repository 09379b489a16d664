"""What a flow may do, and what becomes of it in the graph."""

import functools
import textwrap
from contextlib import nullcontext
from typing import Any

import pytest

from chatlearn.errors import FlowError
from chatlearn.flow.graph import ROOT, CallSummary, FlowNode, describe_graph, sort_nodes
from chatlearn.flow.trace import ControlDependencies, trace_flow
from chatlearn.models.base import BaseModule


class Model(BaseModule):
    def forward_step(self, data):
        raise AssertionError("a trace calls no model")

    def train_step(self, data):
        raise AssertionError("a trace calls no model")

    def score(self, data, scale=1, iteration=0):
        raise AssertionError("a trace calls no model")

    def describe(self, text):
        return f"{self.name}: {text}"


def models(*names) -> Any:
    return [Model(name) for name in names]


def calls(function, name="environment"):
    graph = trace_flow(function, name=name).graph
    return [(f"{n.model_name}.{n.method_name}", n.inputs) for n in graph.nodes], graph.outputs


def test_the_rlhf_flow_of_four_models():
    policy, value, reference, reward = models("policy", "value", "reference", "reward")

    def env_flow(batch):
        policy_out = policy.forward_step(batch)
        ref_out = reference.forward_step(policy_out)
        value_out = value.forward_step(policy_out)
        return reward.forward_step(policy_out, ref_out, value_out)

    traced = trace_flow(env_flow, name="environment")
    assert [n.inputs for n in traced.graph.nodes] == [(ROOT,), (0,), (0,), (0, 1, 2)]
    assert traced.graph.outputs == (3,)
    assert traced.graph.model_names == ("policy", "reference", "value", "reward")
    assert traced.modules["value"] is value
    assert traced.graph.nodes[1].line.endswith("ref_out = reference.forward_step(policy_out)")
    assert traced.graph.nodes[1].line.startswith(f"{__file__}:")


def test_several_roots_and_several_returned_values():
    a, b = models("a", "b")
    found = calls(lambda batch: (b.forward_step(batch), a.forward_step(batch)))
    assert found == ([("b.forward_step", (ROOT,)), ("a.forward_step", (ROOT,))], (0, 1))
    found = calls(lambda batch: {"x": a.forward_step(batch), "y": b.forward_step(batch)})
    assert found[1] == (0, 1)


def test_a_value_returned_twice_counts_once_and_nothing_may_be_returned():
    (a,) = models("a")

    def twice(batch):
        out = a.forward_step(batch)
        return [out, out]

    def nothing(batch):
        a.train_step(batch)

    assert calls(twice)[1] == (0,)
    assert calls(nothing, "trainer")[1] == ()


def test_the_raw_batch_beside_an_output_and_an_input_given_twice():
    a, b = models("a", "b")

    def flow(batch):
        out = a.forward_step(batch)
        return b.forward_step(batch, out, batch)

    assert calls(flow)[0][1] == ("b.forward_step", (ROOT, 0))


def test_a_model_called_several_times_and_by_several_methods():
    (a,) = models("a")

    def flow(batch):
        first = a.forward_step(batch)
        second = a.forward_step(first)
        return a.score(first, second, scale=3)

    nodes = trace_flow(flow, name="environment").graph.nodes
    assert [(n.method_name, n.inputs) for n in nodes] == [
        ("forward_step", (ROOT,)),
        ("forward_step", (0,)),
        ("score", (0, 1)),
    ]
    assert nodes[2].constants == {"scale": 3}


def test_plain_python_runs_at_trace_time_and_leaves_nothing(capsys):
    a, b = models("a", "b")

    def flow(batch):
        """A docstring with a call: a.forward_step(batch)."""
        rounds, names = 3, {"kind": "refine", "parts": [1, 2.5, None]}
        print(f"tracing {names['kind']} over {batch}")
        assert a.describe("plain") == "a: plain"
        out = alias = batch
        for _ in range(rounds):
            out = a.forward_step(out)
        if rounds > 2 and alias is batch:
            out = b.forward_step(out)
        return out

    expected = [("a.forward_step", (i,)) for i in (ROOT, 0, 1)] + [("b.forward_step", (2,))]
    assert calls(flow) == (expected, (3,))
    assert capsys.readouterr().out == "tracing refine over <batch: the flow's argument>\n"


def test_helper_functions_comprehensions_and_closures():
    a, b = models("a", "b")

    def refine(model, *values):
        return model.forward_step(*values)

    def flow(batch):
        outs = [refine(model, batch) for model in (a, b)]
        return refine(a, *outs)

    assert [inputs for _, inputs in calls(flow)[0]] == [(ROOT,), (ROOT,), (0, 1)]


def test_bound_methods_partials_and_callable_objects_are_flows():
    (a,) = models("a")

    class Flow:
        def __call__(self, batch):
            return a.forward_step(batch)

        def method(self, batch, scale=2):
            return a.score(batch, scale=scale)

    flow = Flow()
    assert calls(flow) == ([("a.forward_step", (ROOT,))], (0,))
    assert calls(flow.method) == ([("a.score", (ROOT,))], (0,))
    assert calls(functools.partial(flow.method, scale=4))[1] == (0,)
    assert calls(a.forward_step)[1] == (0,)


def test_a_function_typed_at_a_prompt_has_no_file_but_works():
    (a,) = models("a")
    scope = {"a": a}
    source = textwrap.dedent(
        """
        def flow(batch):
            out = a.forward_step(batch)
            return a.score(out, batch)
        """
    )
    exec(compile(source, "<stdin>", "exec"), scope)
    nodes = trace_flow(scope["flow"], name="environment").graph.nodes
    assert [(n.method_name, n.inputs) for n in nodes] == [
        ("forward_step", (ROOT,)),
        ("score", (0, ROOT)),
    ]
    assert nodes[0].line == "<stdin>:3"


def test_control_dependencies_order_calls_without_data():
    a, b, c = models("a", "b", "c")

    def flow(batch):
        first = a.forward_step(batch)
        with ControlDependencies(first):
            second = b.forward_step(batch)
            with ControlDependencies([second]):
                c.train_step(batch)
        return a.forward_step(batch)

    nodes = trace_flow(flow, name="environment").graph.nodes
    assert [n.after for n in nodes] == [(), (0,), (0, 1), ()]
    assert [n.inputs for n in nodes] == [(ROOT,)] * 4


def test_control_dependencies_outside_a_flow_or_of_something_else_are_refused():
    (a,) = models("a")
    outside = pytest.raises(FlowError, match="used outside a flow: use it in a function")
    with outside, ControlDependencies([]):
        pass

    def flow(batch):
        with ControlDependencies(["a"]):
            return a.forward_step(batch)

    with pytest.raises(FlowError, match=r"with ControlDependencies\(\[\"a\"\]\):\n.* expected an"):
        trace_flow(flow, name="environment")


def test_a_flow_cannot_wait_for_a_call_that_comes_later():
    (model,) = models("m")
    kept = []

    def flow(batch):
        with ControlDependencies(kept[0]) if kept else nullcontext():
            first = model.forward_step(batch)
        kept.append(model.forward_step(first))  # from the trace before, the later call
        return first

    trace_flow(flow, name="environment")
    with pytest.raises(FlowError, match="expected an output of a call of this flow"):
        trace_flow(flow, name="environment")


def test_a_cycle_in_a_graph_that_was_not_traced_names_its_lines_only():
    nodes = [
        FlowNode(0, "a", "forward_step", (ROOT,), "flow.py:1: a", after=(2,)),
        FlowNode(1, "b", "forward_step", (ROOT,), "flow.py:2: b"),
        FlowNode(2, "c", "forward_step", (0,), "flow.py:3: c"),
        FlowNode(3, "d", "forward_step", (2,), "flow.py:4: d"),
    ]
    with pytest.raises(FlowError) as caught:
        sort_nodes("environment", nodes, ())
    assert str(caught.value).splitlines() == [
        "calls of the environment flow wait for each other in a cycle:",
        "  flow.py:1: a",
        "  flow.py:3: c",
    ]


def test_nodes_are_reordered_so_that_dependencies_come_first():
    nodes = [
        FlowNode(0, "a", "forward_step", (ROOT,), "", after=(1,)),
        FlowNode(1, "b", "forward_step", (ROOT,), ""),
        FlowNode(2, "c", "forward_step", (0, 1), ""),
    ]
    graph = sort_nodes("environment", nodes, (2, 0, 2))
    assert [(n.index, n.model_name, n.inputs, n.after) for n in graph.nodes] == [
        (0, "b", (ROOT,), ()),
        (1, "a", (ROOT,), (0,)),
        (2, "c", (1, 0), ()),
    ]
    assert graph.outputs == (2, 1)


def test_a_flow_that_calls_no_model_says_what_to_do():
    def flow(batch):
        return None

    message = r"the trainer flow flow \(.*test_flow_trace.py:\d+\) calls no model: call a method"
    with pytest.raises(FlowError, match=message):
        trace_flow(flow, name="trainer")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda batch, out: batch, "returns its argument; return outputs of model calls"),
        (lambda batch, out: 3, "returns 3; return outputs"),
        (lambda batch, out: [out, "x"], "returns 'x'; return outputs"),
        (lambda batch, out: {"a": [out]}, r"returns \[<batch: output of a.forward_step>\]; return"),
    ],
)
def test_a_flow_returns_outputs_only(result, message):
    (a,) = models("a")
    with pytest.raises(FlowError, match=message):
        trace_flow(lambda batch: result(batch, a.forward_step(batch)), name="environment")


def test_a_flow_takes_one_argument():
    (a,) = models("a")
    none: Any = lambda: a  # noqa: E731
    two: Any = lambda batch, other: a.forward_step(batch, other)  # noqa: E731
    with pytest.raises(FlowError, match=r"must take one argument, the batch: too many"):
        trace_flow(none, name="environment")
    with pytest.raises(FlowError, match="must take one argument, the batch: missing"):
        trace_flow(two, name="environment")


def test_async_and_generator_flows_are_refused():
    (a,) = models("a")

    async def coroutine(batch):
        return a.forward_step(batch)

    def generator(batch):
        yield a.forward_step(batch)

    for flow in (coroutine, generator):
        with pytest.raises(FlowError, match="is async or a generator: write a plain function"):
            trace_flow(flow, name="environment")


def test_two_models_of_one_name_and_values_of_another_flow_are_refused():
    a, same, kept = Model("a"), Model("a"), []
    with pytest.raises(FlowError, match="two different models are called 'a'"):
        trace_flow(lambda b: (a.forward_step(b), same.forward_step(b)), name="environment")
    trace_flow(lambda b: kept.append(a.forward_step(b)), name="environment")
    with pytest.raises(FlowError, match="a.forward_step takes <batch: .*> of another flow"):
        trace_flow(lambda b: a.forward_step(kept[0]), name="environment")


def test_what_a_flow_raises_comes_through_and_ends_the_trace():
    (a,) = models("a")

    def flow(batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace_flow(flow, name="environment")
    assert a.describe("again") == "a: again"


def test_the_graph_is_described_as_a_table():
    a, b = models("a", "b")

    def flow(batch):
        first = a.forward_step(batch)
        with ControlDependencies(first):
            return b.score(batch)

    assert describe_graph(trace_flow(flow, name="environment").graph) == [
        CallSummary("a.forward_step", "batch", "", is_returned=False),
        CallSummary("b.score", "batch", "a.forward_step", is_returned=True),
    ]
