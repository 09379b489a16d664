"""Which calls of a graph may run at the same time."""

from chatlearn.flow.graph import ROOT, FlowGraph, FlowNode
from chatlearn.flow.schedule import plan_stages


def graph(*nodes):
    """Nodes are (model, method, inputs, after)."""
    made = tuple(
        FlowNode(index, model, method, inputs, "", after=after)
        for index, (model, method, inputs, after) in enumerate(nodes)
    )
    return FlowGraph("environment", made, ())


RLHF = graph(
    ("policy", "forward_step", (ROOT,), ()),
    ("reference", "forward_step", (0,), ()),
    ("value", "forward_step", (0,), ()),
    ("reward", "forward_step", (0, 1, 2), ()),
)


def test_rows_stream_so_that_every_stage_runs_beside_the_others():
    stages = plan_stages(RLHF)
    assert [stage.runs_beside for stage in stages] == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)]
    assert [stage.consumers for stage in stages] == [(1, 2, 3), (3,), (3,), ()]
    assert all(stage.waits_for == () for stage in stages)


def test_models_of_a_colocation_group_take_turns():
    stages = plan_stages(RLHF, [("policy", "value")])
    assert [stage.takes_turns_with for stage in stages] == [(2,), (), (0,), ()]
    assert [stage.runs_beside for stage in stages] == [(1, 3), (0, 2, 3), (1, 3), (0, 1, 2)]


def test_two_calls_of_one_model_take_turns():
    stages = plan_stages(graph(("a", "x", (ROOT,), ()), ("a", "y", (0,), ())))
    assert [stage.takes_turns_with for stage in stages] == [(1,), (0,)]
    assert [stage.runs_beside for stage in stages] == [(), ()]


def test_a_control_dependency_waits_for_the_call_and_all_before_it():
    stages = plan_stages(
        graph(
            ("a", "x", (ROOT,), ()),
            ("b", "x", (0,), ()),
            ("c", "x", (ROOT,), (1,)),
            ("d", "x", (2,), ()),
        )
    )
    assert [stage.waits_for for stage in stages] == [(), (), (0, 1), (0, 1)]
    assert [stage.runs_beside for stage in stages] == [(1,), (0,), (3,), (2,)]


def test_training_waits_for_the_whole_batch():
    stages = plan_stages(
        graph(
            ("a", "forward_step", (ROOT,), ()),
            ("b", "train_step", (0,), ()),
            ("c", "train_step", (ROOT,), ()),
        )
    )
    assert [stage.waits_for for stage in stages] == [(), (0,), ()]
    assert [stage.runs_beside for stage in stages] == [(2,), (2,), (0, 1)]
