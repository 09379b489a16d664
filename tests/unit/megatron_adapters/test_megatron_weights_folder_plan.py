"""Where tensors lie in the files of a Hugging Face folder."""

import json
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatlearn.errors import ConfigError
from chatlearn.parallel.sharding import Box
from megatron_adapters.weights.folder_plan import TensorPlace, build_index, plan_files


@st.composite
def boxes(draw):
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    offset = tuple(draw(st.integers(0, size - 1)) for size in shape)
    length = tuple(draw(st.integers(1, s - o)) for s, o in zip(shape, offset, strict=True))
    return shape, Box(offset, length)


@given(boxes())
def test_a_run_is_exactly_the_bytes_of_a_box_that_lies_in_one_piece(case):
    shape, box = case
    place = TensorPlace("f", 100, shape, "bfloat16")
    strides = [1] * len(shape)
    for axis in reversed(range(len(shape) - 1)):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    ranges = [range(o, o + n) for o, n in zip(box.offset, box.shape, strict=True)]
    at = sorted(
        sum(i * s for i, s in zip(index, strides, strict=True)) for index in product(*ranges)
    )
    is_one = at == list(range(at[0], at[0] + len(at)))
    run = place.run_of(box)
    assert (run is not None) == is_one
    if run is not None:
        assert run == (100 + 2 * at[0], 2 * len(at))


def test_files_hold_what_fits_and_the_index_names_all():
    shapes = {"a": (4, 4), "b": (3,), "c": (100,), "d": (2,)}
    dtypes = {"a": "bfloat16", "b": "bfloat16", "c": "float32", "d": "float32"}
    plan = plan_files(shapes, dtypes, 48)
    assert [file.name for file in plan.files] == [
        f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    index = build_index(plan)
    assert index["metadata"]["total_size"] == 32 + 6 + 400 + 8
    assert [index["weight_map"][name][6:11] for name in "abcd"] == [
        "00001",
        "00001",
        "00002",
        "00003",
    ]
    for file in plan.files:
        length = int.from_bytes(file.header[:8], "little")
        header = json.loads(file.header[8:])
        assert length == len(file.header) - 8
        assert length % 8 == 0
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_"]
        assert file.num_bytes == len(file.header) + max(ends)


def test_larger_elements_come_first_so_that_all_are_aligned():
    plan = plan_files({"a": (3,), "b": (5,)}, {"a": "bfloat16", "b": "float32"}, 1000)
    assert build_index(plan) is None
    assert plan.files[0].name == "model.safetensors"
    assert all(plan.places[name].start % size == 0 for name, size in (("a", 2), ("b", 4)))


def test_a_dtype_that_is_not_written_is_refused():
    with pytest.raises(ConfigError, match="x: dtype int8, expected one of float32"):
        plan_files({"x": (1,)}, {"x": "int8"}, 10)
