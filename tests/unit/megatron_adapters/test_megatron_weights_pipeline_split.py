"""Which layers each chunk of each pipeline stage holds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import ConfigError
from chatlearn.parallel.layout import ParallelLayout
from megatron_adapters.weights.pipeline_split import split_layers


def numbers(num_layers, pp_size=1, vpp_size=1, **fields):
    layout = ParallelLayout(pp_size=pp_size, vpp_size=vpp_size)
    chunks = split_layers({"num_layers": num_layers, **fields}, layout)
    return [[list(chunk) for chunk in stage] for stage in chunks]


def test_virtual_stages_take_turns():
    assert numbers(8, 2, 2) == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def test_the_first_and_the_last_stage_may_have_other_sizes():
    fields = {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 2}
    assert numbers(7, 4, **fields) == [[[0]], [[1, 2]], [[3, 4]], [[5, 6]]]


def test_embedding_and_loss_may_count_as_layers():
    fields = {
        "account_for_embedding_in_pipeline_split": True,
        "account_for_loss_in_pipeline_split": True,
    }
    assert numbers(6, 2, 2, **fields) == [[[0], [3, 4]], [[1, 2], [5]]]


@pytest.mark.parametrize(
    "given_layout",
    [
        "E|t*2|t|L",
        "E,|tt,|t|L",
        [["embedding"], ["decoder", "decoder"], ["Decoder "], ["loss"]],
    ],
)
def test_a_layout_is_read_as_text_or_lists(given_layout):
    found = numbers(3, 2, 2, pipeline_model_parallel_layout=given_layout)
    assert found == [[[], [2]], [[0, 1], []]]


def test_a_group_of_stages_may_be_repeated():
    found = numbers(9, 4, pipeline_model_parallel_layout="Ettt|(tt|)*2,ttL")
    assert [len(stage[0]) for stage in found] == [3, 2, 2, 2]


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
def test_every_layer_lies_in_exactly_one_chunk(pp_size, vpp_size, per_chunk, data):
    edge = data.draw(st.integers(1, 3)) * vpp_size
    fields = {"num_layers_in_first_pipeline_stage": edge} if pp_size > 1 else {}
    middle = (pp_size - len(fields)) * vpp_size * per_chunk
    num_layers = middle + edge * len(fields)
    found = numbers(num_layers, pp_size, vpp_size, **fields)
    flat = [layer for stage in found for chunk in stage for layer in chunk]
    assert sorted(flat) == list(range(num_layers))


@pytest.mark.parametrize(
    ("num_layers", "pp_size", "vpp_size", "fields", "message"),
    [
        (7, 2, 1, {}, "7 layers cannot be spread evenly over 2 stages"),
        (6, 2, 2, {}, "3 layers cannot be spread evenly over 2 chunks"),
        (6, 3, 1, {"num_layers_in_first_pipeline_stage": 3}, "over 2 middle stages"),
        (6, 2, 1, {"pipeline_model_parallel_layout": "Ettt|ttL"}, "5 in all"),
        (6, 2, 1, {"pipeline_model_parallel_layout": "Ettt|tt|tL"}, "has 3 chunks"),
        (6, 2, 1, {"pipeline_model_parallel_layout": "Ettt|tttmL"}, "mtp: expected"),
    ],
)
def test_a_split_that_does_not_add_up_is_refused(num_layers, pp_size, vpp_size, fields, message):
    with pytest.raises(ConfigError, match=message):
        numbers(num_layers, pp_size, vpp_size, **fields)
