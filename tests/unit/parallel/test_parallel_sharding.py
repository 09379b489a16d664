"""Boxes and shards in global index space."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from chatlearn.parallel.sharding import Box, TensorShard


def indices(box):
    starts = zip(box.offset, box.shape, strict=True)
    return set(product(*(range(at, at + length) for at, length in starts)))


def boxes(num_axes):
    axis = st.tuples(st.integers(0, 5), st.integers(1, 4))
    return st.lists(axis, min_size=num_axes, max_size=num_axes).map(
        lambda axes: Box(tuple(a for a, _ in axes), tuple(n for _, n in axes))
    )


@given(st.integers(0, 3).flatmap(lambda n: st.tuples(boxes(n), boxes(n))))
def test_the_intersection_holds_exactly_the_common_elements(pair):
    one, other = pair
    common = one.intersect(other)
    expected = indices(one) & indices(other)
    assert (indices(common) if common else set()) == expected
    assert common == other.intersect(one)
    assert (common.num_elements if common else 0) == len(expected)


def test_boxes_that_only_touch_share_nothing():
    assert Box((0, 0), (2, 4)).intersect(Box((2, 0), (2, 4))) is None


def test_a_scalar_is_a_box_of_one_element():
    scalar = Box((), ())
    assert scalar.num_elements == 1
    assert scalar.intersect(scalar) == scalar


def test_a_shard_says_where_a_part_of_its_box_lies_in_the_local_tensor():
    shard = TensorShard("w", (8, 6), Box((4, 0), (4, 6)), "float32", "local.w", (0, 0))
    assert shard.local_shape == (4, 6)
    assert shard.local_slices() == (slice(0, 4), slice(0, 6))
    assert shard.local_slices(Box((5, 2), (2, 3))) == (slice(1, 3), slice(2, 5))


def test_a_shard_may_begin_inside_its_local_tensor():
    # The second half of a fused tensor: global rows 0..4 lie in local rows 4..8.
    shard = TensorShard("up", (4, 2), Box((0, 0), (4, 2)), "float32", "fused", (4, 0))
    assert shard.local_slices(Box((1, 0), (2, 2))) == (slice(5, 7), slice(0, 2))


def test_leading_axes_of_stacked_layers_are_no_axes_of_the_local_tensor():
    box = Box((3, 2, 0), (1, 2, 5))
    shard = TensorShard("layers.w", (6, 4, 5), box, "bfloat16", "layers.3.w", (0, 0))
    assert shard.local_shape == (2, 5)
    assert shard.local_slices(Box((3, 3, 1), (1, 1, 4))) == (slice(1, 2), slice(1, 5))
