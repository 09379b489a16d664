"""What a flow does with a batch that it cannot do."""

import copy
import operator
import pickle

import pytest
import torch

from chatlearn.errors import FlowError
from chatlearn.flow.trace import trace_flow
from chatlearn.models.base import BaseModule


class Model(BaseModule):
    def forward_step(self, data):
        return data


def trace(use):
    model = Model("m")

    def flow(batch):
        out = model.forward_step(batch)
        use(out)  # the line that is named
        return out

    return trace_flow(flow, name="environment")


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda out: out["tokens"], "is indexed"),
        (lambda out: operator.setitem(out, "k", 1), "is indexed"),
        (lambda out: operator.delitem(out, "k"), "is indexed"),
        (lambda out: out + 1, "is calculated with"),
        (lambda out: 1 - out, "is calculated with"),
        (lambda out: -out, "is calculated with"),
        (lambda out: out | {"k": 1}, "is calculated with"),
        (lambda out: 1 if out else 2, "is used as a condition"),
        (lambda out: not out, "is used as a condition"),
        (lambda out: out == 3, "is compared"),
        (lambda out: out != 3, "is compared"),
        (lambda out: out < 3, "is compared"),
        (lambda out: list(out), "is looped over, unpacked, searched or measured"),
        (lambda out: {**out}, "is asked for its attribute 'keys'"),
        (lambda out: len(out), "is looped over"),
        (lambda out: "k" in out, "is looped over"),
        (lambda out: out.shape, "is asked for its attribute 'shape'"),
        (lambda out: setattr(out, "k", 1), "is given an attribute 'k'"),
        (lambda out: delattr(out, "k"), "loses its attribute 'k'"),
        (lambda out: out(), "is called or entered"),
        (lambda out: float(out), "is converted to a number, an array or bytes"),
        (lambda out: pickle.dumps(out), "is pickled"),
        (lambda out: torch.relu(out), "passed to torch's relu"),
    ],
)
def test_whatever_needs_the_rows_names_the_line_and_the_remedy(use, what):
    with pytest.raises(FlowError, match=what) as caught:
        trace(use)
    line, message = str(caught.value).split("\n")
    assert line.startswith(f"{__file__}:")
    assert "write this as a method of a module and call that method in the flow" in message


def test_the_line_is_that_of_the_innermost_function_of_the_user():
    with pytest.raises(FlowError) as caught:
        trace(lambda out: out["named"])
    assert str(caught.value).split("\n")[0].endswith('trace(lambda out: out["named"])')


def test_the_output_is_named_by_the_call_that_gave_it():
    with pytest.raises(FlowError, match="<batch: output of m.forward_step> is indexed"):
        trace(lambda out: out[0])


def test_printing_keeping_and_copying_a_batch_is_fine():
    seen = []

    def use(out):
        seen.extend(
            [repr(out), f"{out:>40}", copy.copy(out) is out, copy.deepcopy([out])[0] is out]
        )
        return {out: 1}[out], hasattr(out, "__deepcopy__"), isinstance(out, dict)

    trace(use)
    shown = "<batch: output of m.forward_step>"
    assert seen == [shown, f"{shown:>40}", True, True]
