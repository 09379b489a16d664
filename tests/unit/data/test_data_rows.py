"""RowBatch and the join of a call's inputs."""

import pickle
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.data.rows import NamedInput, RowBatch, RowId, join_inputs
from chatlearn.errors import DataError


def ids(*prompts):
    return tuple(RowId(prompt, 0) for prompt in prompts)


def batch(prompts, **columns):
    return RowBatch(ids(*prompts), columns)


row_ids = st.lists(
    st.builds(RowId, st.integers(0, 40), st.integers(0, 3)), unique=True, min_size=1, max_size=20
)


def tagged(chosen, key):
    """A column of ragged tensors that say which row they belong to."""
    return RowBatch(
        tuple(chosen),
        {key: [torch.full((row.prompt % 4,), row.prompt * 10 + row.sample) for row in chosen]},
    )


def test_rows_become_columns_in_order():
    made = RowBatch.from_rows(ids(4, 2), [{"a": 1, "b": "x"}, {"b": "y", "a": 2}])
    assert made.columns == {"a": [1, 2], "b": ["x", "y"]}
    assert made.to_rows() == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert len(made) == 2


def test_one_object_may_be_the_row_of_several_samples():
    row = {"prompt": "1+1="}
    made = RowBatch.from_rows((RowId(0, 0), RowId(0, 1)), [row, row])
    assert made.columns == {"prompt": ["1+1=", "1+1="]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}], "got 1 rows for 2 row ids"),
        ([{"a": 1}, "text"], "row 2.0 is a str; expected a mapping"),
        ([{"a": 1}, {"b": 1}], r"row 2.0 has the keys \['b'\]; the rows before it have \['a'\]"),
        ([{}, {"b": 1}], r"row 2.0 has the keys \['b'\]; the rows before it have \[\]"),
    ],
)
def test_rows_that_do_not_fit_together_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        RowBatch.from_rows(ids(1, 2), rows)


def test_a_doubled_id_is_refused():
    with pytest.raises(DataError, match=r"rows occur twice: 1\.0"):
        RowBatch.from_rows(ids(1, 1), [{"a": 1}, {"a": 2}])
    with pytest.raises(DataError, match=r"rows occur twice: 2\.0"):
        RowBatch.concat([batch([1, 2], a=[1, 2]), batch([2], a=[3])])


def test_collate_stacks_equal_shapes_and_leaves_the_rest_as_lists():
    made = batch(
        [1, 2],
        same=[torch.tensor([1, 2]), torch.tensor([3, 4])],
        ragged=[torch.tensor([1]), torch.tensor([1, 2])],
        mixed=[torch.tensor(1), torch.tensor(1.0)],
        text=["a", "b"],
    )
    columns = made.collate()
    assert torch.equal(columns["same"], torch.tensor([[1, 2], [3, 4]]))
    assert [t.tolist() for t in columns["ragged"]] == [[1], [1, 2]]
    assert isinstance(columns["mixed"], list)
    assert columns["text"] == ["a", "b"]


def test_writing_to_collated_columns_leaves_the_batch_alone():
    made = batch([1, 2], x=[torch.zeros(2), torch.zeros(2)], text=["a", "b"])
    columns = made.collate()
    columns["x"].add_(1)
    columns["text"].append("c")
    assert [t.tolist() for t in made.columns["x"]] == [[0.0, 0.0], [0.0, 0.0]]
    assert made.columns["text"] == ["a", "b"]


def test_an_output_is_cut_into_rows_without_its_graph():
    weight = torch.ones(2, requires_grad=True)
    output = {
        "scores": weight * 3,
        "words": ("a", "b"),
        "parts": [weight * 1, weight * 2],
        "array": np.array([1, 2]),
    }
    cut = RowBatch.from_output(ids(5, 6), output, "policy.score")
    assert [t.item() for t in cut.columns["scores"]] == [3.0, 3.0]
    assert not any(t.requires_grad for t in cut.columns["scores"] + cut.columns["parts"])
    assert cut.columns["words"] == ["a", "b"]
    assert cut.columns["array"] == [1, 2]


def test_rows_share_no_memory_with_the_output():
    weight, array = torch.nn.Parameter(torch.zeros(2, 3)), np.zeros((2, 2))
    parts, pair, thing = [torch.zeros(1), torch.zeros(2)], ([0], "a"), SimpleNamespace(value=0)
    output = {"w": weight[:2], "a": array, "p": parts, "t": [pair, pair], "o": [thing, thing]}
    rows = RowBatch.from_output(ids(5, 6), output, "policy.score").to_rows()[0]
    with torch.no_grad():
        weight.add_(1)
    array += 1
    parts[0] += 1
    pair[0].append(1)
    thing.value = 1
    assert (rows["w"].tolist(), rows["a"].tolist()) == ([0.0] * 3, [0.0, 0.0])
    assert (rows["p"].tolist(), rows["t"], rows["o"].value) == ([0.0], ([0], "a"), 0)


def test_a_method_gets_tuples_and_objects_of_its_own():
    made = batch([1], t=[([0],)], o=[SimpleNamespace(value=0)])
    columns = made.collate()
    columns["t"][0][0].append(1)
    columns["o"][0].value = 1
    assert (made.columns["t"], made.columns["o"][0].value) == ([([0],)], 0)


def test_what_cannot_leave_the_process_names_the_call_and_the_column():
    message = "policy.score: column 'lock' holds what cannot be copied or sent .*lock"
    with pytest.raises(DataError, match=message):
        RowBatch.from_output(ids(1), {"lock": [Lock()]}, "policy.score")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "policy.score gave NoneType; expected a dict of column names"),
        ([1, 2], "policy.score gave list; expected a dict"),
        ({3: [1, 2]}, "policy.score gave the key 3; expected column names as str"),
        ({"x": torch.zeros(3)}, r"column 'x' is a tensor of shape \(3,\); .* first axis of 2"),
        ({"x": torch.tensor(1.0)}, r"column 'x' is a tensor of shape \(\); .* first axis of 2"),
        ({"x": [1]}, "column 'x' has 1 entries; expected 2, one per row"),
        ({"x": "ab"}, "column 'x' is a str; expected a tensor or a list with 2 entries"),
        ({"x": {1, 2}}, "column 'x' is a set"),
        ({"x": 1.5}, "column 'x' is a float"),
    ],
)
def test_an_output_that_is_no_rows_is_refused(output, message):
    with pytest.raises(DataError, match=message):
        RowBatch.from_output(ids(1, 2), output, "policy.score")


def test_select_names_the_rows_that_are_missing():
    with pytest.raises(DataError, match=r"7 rows are missing: 10\.0, .*14\.0 and 2 more"):
        batch([1], a=[1]).select(ids(1, *range(10, 17)))


def test_concat_needs_batches_with_the_same_columns():
    with pytest.raises(DataError, match=r"different columns: \['a'\] and \['b'\]"):
        RowBatch.concat([batch([1], a=[1]), batch([2], b=[1])])
    with pytest.raises(DataError, match="no batches"):
        RowBatch.concat([])


@given(row_ids, st.randoms(use_true_random=False), st.data())
def test_cutting_shuffling_and_joining_keeps_every_row_with_its_values(chosen, random, data):
    split = data.draw(st.integers(0, len(chosen)))
    whole = tagged(chosen, "x")
    shuffled = list(chosen)
    random.shuffle(shuffled)
    parts = [whole.select(chosen[split:]), whole.select(chosen[:split])]
    other = tagged(shuffled, "y")
    joined = join_inputs(
        shuffled, [NamedInput("p", RowBatch.concat(parts)), NamedInput("q", other)]
    )
    assert joined.row_ids == tuple(shuffled)
    for key in ("x", "y"):
        for row, value in zip(joined.row_ids, joined.columns[key], strict=True):
            assert value.tolist() == [row.prompt * 10 + row.sample] * (row.prompt % 4)


@given(row_ids)
def test_a_batch_survives_pickling(chosen):
    made = tagged(chosen, "x")
    made.columns["text"] = [str(row) for row in chosen]  # type: ignore[index]
    back = pickle.loads(pickle.dumps(made))
    assert back.row_ids == made.row_ids
    assert back.columns["text"] == made.columns["text"]
    for one, other in zip(back.columns["x"], made.columns["x"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_pickling_keeps_dtypes_and_scalars():
    made = batch([1, 2], r=[torch.tensor(1.5), torch.tensor(2.5)], m=[torch.tensor(1), "x"])
    back = pickle.loads(pickle.dumps(made))
    assert [t.shape for t in back.columns["r"]] == [torch.Size([]), torch.Size([])]
    assert back.columns["r"][1].item() == 2.5
    assert back.columns["m"][1] == "x"


def test_join_takes_only_the_rows_of_the_call_in_its_order():
    joined = join_inputs(ids(3, 1), [NamedInput("p", batch([1, 2, 3], a=["x", "y", "z"]))])
    assert joined.columns == {"a": ["z", "x"]}


def test_join_names_the_input_that_lacks_a_row():
    inputs = [NamedInput("p", batch([1, 2], a=[1, 2])), NamedInput("q", batch([1], b=[1]))]
    with pytest.raises(DataError, match=r"input from q: 1 rows are missing: 2\.0"):
        join_inputs(ids(1, 2), inputs)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")])),
        (torch.tensor([1, 2]), torch.tensor([1, 2])),
        (torch.tensor([True]), torch.tensor([True])),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan])),
        (np.array(["a"]), np.array(["a"])),
        (float("nan"), float("nan")),
        ("text", "text"),
        ({"k": [torch.tensor(1)]}, {"k": [torch.tensor(1)]}),
        (None, None),
    ],
)
def test_a_shared_key_with_the_same_content_is_fine(one, other):
    inputs = [NamedInput("p", batch([1], k=[one])), NamedInput("q", batch([1], k=[other]))]
    assert join_inputs(ids(1), inputs).columns["k"] == [one]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([1.0]), torch.tensor([2.0])),
        (torch.tensor([1.0]), torch.tensor([1])),
        (torch.tensor([1.0]), torch.tensor([[1.0]])),
        (torch.tensor([1.0]), [1.0]),
        (np.array([1.0]), np.array([1.0], dtype=np.float32)),
        (np.array([1.0]), torch.tensor([1.0])),
        (float("nan"), 1.0),
        ("a", "b"),
        ([torch.tensor(1)], [torch.tensor(2)]),
        ({"k": 1}, {"j": 1}),
        ([1], (1,)),
        (None, 0),
    ],
)
def test_a_shared_key_with_other_content_names_both_producers_and_the_row(one, other):
    inputs = [
        NamedInput("policy.forward_step", batch([1, 2], k=["same", one])),
        NamedInput("reward.forward_step", batch([2, 1], k=[other, "same"])),
    ]
    message = (
        "policy.forward_step and reward.forward_step both give the key 'k', with different "
        r"content \(first at row 2\.0\): rename it"
    )
    with pytest.raises(DataError, match=message):
        join_inputs(ids(1, 2), inputs)


def test_only_the_rows_of_the_call_are_compared():
    inputs = [
        NamedInput("p", batch([1, 2], k=["same", "old"])),
        NamedInput("q", batch([1, 2], k=["same", "new"])),
    ]
    assert join_inputs(ids(1), inputs).columns == {"k": ["same"]}
